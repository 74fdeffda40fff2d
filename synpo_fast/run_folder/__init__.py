"""The files of a run: checkpoints, the best model, the lock, and the rules for overwriting and resuming."""
