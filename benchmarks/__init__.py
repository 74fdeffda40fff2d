"""Benchmarks: every figure is measured beside the thing it is compared with, in the same run."""
