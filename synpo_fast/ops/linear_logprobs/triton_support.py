"""Checks if the Triton backend can run here, without importing Triton."""

import functools
import importlib.util
import os

import torch

from synpo_fast.ops.linear_logprobs.problem import FLOAT_DTYPES

FIRST_CAPABILITY = 80  # the first generation with matrix instructions for bf16 and tf32, and asynchronous copies


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if Triton's interpreter is selected. It runs kernels on CPU tensors and must be selected before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def tf32_allowed() -> bool:
    """True if torch may compute fp32 products of a GPU in tf32.

    The older `torch.backends.cuda.matmul.allow_tf32` raises once `torch.backends.fp32_precision` or another of the newer settings
    was assigned. The newer ones show what was assigned to the older.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def capability(device: torch.device) -> int:
    """Compute capability as 80, 90, 100, ...; 0 where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def reason_unusable(device: str, dtype: torch.dtype) -> str | None:
    """The reason why the Triton backend cannot work on such tensors, or None if it can."""
    if not _installed():
        return "triton is not installed; `pip install synpo-fast[gpu]`"
    if dtype not in FLOAT_DTYPES:
        return f"it takes float32, bfloat16 and float16, hidden is {dtype}"
    if interpreting():
        if dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 products wrongly; use float32 or float16 there"
        return None
    if device not in ("cuda", "meta"):
        return f"it works on CUDA tensors, hidden is on {device}"
    return None


def reason_too_old(device: torch.device) -> str | None:
    """The reason why the products of this op cannot run on a GPU of an early generation, or None if they can."""
    # Tensors without values can be on a device that this machine lacks.
    if device.type != "cuda" or torch.cuda.device_count() == 0 or capability(device) >= FIRST_CAPABILITY:
        return None
    return (
        f"it needs a GPU of compute capability {FIRST_CAPABILITY / 10} or above, {device} has {capability(device) / 10}; "
        "compiled for older ones the kernels spill 10 to 15 KB of registers per thread"
    )
