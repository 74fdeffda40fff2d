"""Counted FLOPs of a call: the counter is the package's, whose --profile counts steps with it."""

from synpo_fast.profiling.counted_flops import count_flops

__all__ = ["count_flops"]
