"""What a trained model is for: filling masks, vectors of sentences, fine-tuning."""
