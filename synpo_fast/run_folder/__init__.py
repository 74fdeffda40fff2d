"""The files of a run: checkpoints, the best model, locks, and the rules for overwriting and resuming."""
