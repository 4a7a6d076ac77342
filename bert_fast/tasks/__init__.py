"""Fine-tuning: what a task is, the files that its examples are in, and the loop that trains them all."""
