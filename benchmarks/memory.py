"""Peak extra memory of one call: measured as the package does for --profile."""

from synpo_fast.profiling.peak_memory import peak_extra_memory

__all__ = ["peak_extra_memory"]
