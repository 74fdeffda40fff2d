"""Settings that all fused losses have: their check, and how they are shown."""

from typing import Any

from synpo_fast.ops.linear_logprobs import BACKENDS
from synpo_fast.ops.linear_logprobs.problem import check_numbers


def check_settings(
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    keep_bytes: int | None = None,
    backend: str | None = None,
) -> None:
    """Raises ValueError for a value that the op would refuse in the first step."""
    check_numbers(logit_scale, softcap, ignore_index)
    if keep_bytes is not None and (isinstance(keep_bytes, bool) or not isinstance(keep_bytes, int)):
        raise ValueError(f"keep_bytes must be a number of bytes, got {keep_bytes!r}")
    if keep_bytes is not None and keep_bytes < 0:
        raise ValueError(f"keep_bytes must not be negative, got {keep_bytes}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")


def shown(options: dict[str, Any]) -> str:
    """The options as in a call, for a module's repr."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
