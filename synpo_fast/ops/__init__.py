"""Numerical operations on tensors. Nothing here knows about batches, pairs or models."""
