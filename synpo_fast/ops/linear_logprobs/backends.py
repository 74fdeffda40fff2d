"""The backends by name: which one runs, and its forward and backward."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs import chunked, host, native
from synpo_fast.ops.linear_logprobs.problem import Computed, Problem, Wanted

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
    reason = _why_impossible(candidate, device, hidden.dtype)
    if reason is None:
        return candidate
    if wanted is not None:
        raise ValueError(f"backend={wanted!r} cannot be used here: {reason}")
    if hidden.dtype != torch.float64:
        _warn_once(f"fused_linear_logprobs uses backend='chunked', not {candidate!r}: {reason}")
    return "chunked"


def _why_impossible(backend: str, device: str, dtype: torch.dtype) -> str | None:
    if backend == "native":
        return native.reason_unusable(device, dtype)
    from synpo_fast.ops.linear_logprobs import triton_support

    return triton_support.reason_unusable(device, dtype)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _module(backend: str) -> Any:
    if backend == "triton":
        from synpo_fast.ops.linear_logprobs import triton_launch

        return triton_launch
    return {"chunked": chunked, "native": native}[backend]


def forward(problem: Problem, wanted: Wanted, backend: str) -> Computed:
    """The forward of a backend, without autograd."""
    if backend == "triton":
        return _module(backend).linear_logprobs_forward(problem, wanted)
    return host.forward(_module(backend), problem, wanted)


def backward(
    problem: Problem, grad_logps: Tensor, computed: Computed, needs: tuple[bool, bool, bool], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of a backend: gradients to hidden, weight and bias, None where they are not needed."""
    if backend == "triton":
        return _module(backend).linear_logprobs_backward(problem, grad_logps, computed, needs)
    return host.backward(_module(backend), problem, grad_logps, computed, needs)
