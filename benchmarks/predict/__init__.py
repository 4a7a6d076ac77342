"""What a step should cost: a prediction, beside which stands what was measured."""
