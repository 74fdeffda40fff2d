"""Processes that read pairs ahead of the training loop."""
