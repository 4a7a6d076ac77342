"""Pre-training: configuration, schedule, plan of the updates, the update, checkpoints, and the loop over them."""
