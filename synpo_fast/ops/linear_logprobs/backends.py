"""The backends by name: which one runs, and its forward and backward."""

import functools
import warnings

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs import chunked, host, native
from synpo_fast.ops.linear_logprobs.problem import Computed, Problem, Wanted

_HOST_DRIVEN = {"chunked": chunked, "native": native}
BACKENDS = ("reference", "chunked", "native", "triton")


def choose_backend(hidden: Tensor, wanted: str | None) -> str:
    """The backend that will run. Raises ValueError with the reason if the wanted one cannot."""
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {wanted!r}")
    if wanted in ("reference", "chunked"):
        return wanted
    device = hidden.device.type
    if wanted is None and device not in ("cpu", "cuda"):
        return "chunked"
    candidate = wanted or ("triton" if device == "cuda" else "native")
    if wanted is None and candidate == "triton" and _belongs_to_cublas(hidden.dtype):
        return "chunked"
    reason = _why_impossible(candidate, hidden.device, hidden.dtype)
    if reason is None:
        return candidate
    if wanted is not None:
        raise ValueError(f"backend={wanted!r} cannot be used here: {reason}")
    if hidden.dtype != torch.float64:
        _warn_once(f"fused_linear_logprobs uses backend='chunked', not {candidate!r}: {reason}")
    return "chunked"


def _belongs_to_cublas(dtype: torch.dtype) -> bool:
    """True for full fp32. It has no matrix instructions, and Triton's tiles of fused multiply-adds spill registers."""
    from synpo_fast.ops.linear_logprobs import triton_support

    return dtype == torch.float32 and not triton_support.tf32_allowed()


def _why_impossible(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if backend == "native":
        return native.reason_unusable(device.type, dtype)
    from synpo_fast.ops.linear_logprobs import triton_support

    return triton_support.reason_unusable(device.type, dtype) or triton_support.reason_too_old(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def choose_at_run_time(hidden: Tensor, requested: str) -> str:
    """The backend for a request that may be "auto", as a compiled graph stores it."""
    return choose_backend(hidden, None if requested == "auto" else requested)


def forward(problem: Problem, wanted: Wanted, backend: str) -> Computed:
    """The forward of a backend, without autograd."""
    if backend == "triton":
        from synpo_fast.ops.linear_logprobs import triton_launch

        return triton_launch.linear_logprobs_forward(problem, wanted)
    return host.forward(_HOST_DRIVEN[backend], problem, wanted)


def backward(
    problem: Problem, grad_logps: Tensor, computed: Computed, needs: tuple[bool, bool, bool], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of a backend: gradients to hidden, weight and bias, None where they are not needed."""
    if backend == "triton":
        from synpo_fast.ops.linear_logprobs import triton_backward

        return triton_backward.linear_logprobs_backward(problem, grad_logps, computed, needs)
    return host.backward(_HOST_DRIVEN[backend], problem, grad_logps, computed, needs)
