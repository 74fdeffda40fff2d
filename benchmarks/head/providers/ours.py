"""synpo_fast's op, one contestant per backend."""

from __future__ import annotations

from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import Inputs
from benchmarks.head.providers.base import differentiated, need_cuda


def _backend(inputs: Inputs, backend: str) -> Step:
    from synpo_fast import fused_linear_logprobs

    def forward() -> Tensor:
        return fused_linear_logprobs(inputs.hidden, inputs.weight, inputs.labels, backend=backend)

    return differentiated(forward, inputs, f"fused_linear_logprobs(backend={backend!r})")


def synpo_chunked(inputs: Inputs) -> Step:
    return _backend(inputs, "chunked")


def synpo_native(inputs: Inputs) -> Step:
    if inputs.hidden.device.type != "cpu":
        raise Unavailable("the native backend is for CPU tensors")
    return _backend(inputs, "native")


def synpo_triton(inputs: Inputs) -> Step:
    need_cuda(inputs, "the triton backend")
    return _backend(inputs, "triton")


def synpo_reference(inputs: Inputs) -> Step:
    return _backend(inputs, "reference")
