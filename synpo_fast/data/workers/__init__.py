"""Worker processes that read pairs ahead of the training loop."""
