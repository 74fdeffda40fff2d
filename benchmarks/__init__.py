"""Benchmarks. Every figure is measured in the same run as what it is compared with."""
