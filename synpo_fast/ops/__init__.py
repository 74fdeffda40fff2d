"""Numerical operations on tensors. Nothing here knows of batches, pairs or models."""
