"""The update: micro-batches forward and backward, the optimiser, its processes, and losses on held-out text."""
