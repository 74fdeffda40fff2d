"""Test clips for tests and benchmarks."""
