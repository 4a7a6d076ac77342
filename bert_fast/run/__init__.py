"""One pre-training run, from its options to RUN/model: the loop, its checkpoints, what it reports and leaves."""
