"""Backend "native": token log-probs on CPUs through csrc/linear_logprobs.cpp, which describes the algorithm."""

import functools
import sys

import torch
from torch import Tensor

from synpo_fast.ops import native_library
from synpo_fast.ops.linear_logprobs.problem import FLOAT_DTYPES, Computed, Problem


def reason_unusable(device: str, dtype: torch.dtype) -> str | None:
    """The reason why the native backend cannot work on such tensors, or None if it can."""
    if device not in ("cpu", "meta"):
        return f"it works on CPU tensors, hidden is on {device}"
    if dtype not in FLOAT_DTYPES:
        return f"it takes float32, bfloat16 and float16, hidden is {dtype}"
    reason = native_library.reason_unavailable()
    if reason is None and "torch.utils.flop_counter" in sys.modules:
        _register_flops()
    return reason


@functools.cache
def _register_flops() -> None:
    """Tells torch's FLOP counter the work of the operators. Only done on demand: that module imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    operators = torch.ops.synpo_fast_native

    @register_flop_formula(operators.linear_logprobs_forward)
    def forward_flops(
        hidden, weight, labels, bias, logit_scale, softcap, logps, normalisers, direction, *_, **__
    ) -> int:
        return (4 if direction[0] else 2) * hidden[0] * weight[0] * weight[1]

    @register_flop_formula(operators.linear_logprobs_weight_grad)
    def weight_grad_flops(hidden, weight, *_, **__) -> int:
        return 4 * hidden[0] * weight[0] * weight[1]


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of kept exponentials: that of the matrix products."""
    return torch.float32 if dtype == torch.float16 else dtype


def forward_rows(problem: Problem, hidden: Tensor, labels: Tensor, computed: Computed) -> None:
    """Fills the tensors of `computed` that are not empty, for hidden [n, D] and labels [n], all valid."""
    torch.ops.synpo_fast_native.linear_logprobs_forward(
        hidden, problem.weight, labels, problem.bias, problem.logit_scale, problem.softcap,
        computed.logps, computed.normalisers, computed.direction, computed.exponentials, computed.stats,
    )  # fmt: skip


def weight_grad_rows(
    problem: Problem,
    hidden: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalisers: Tensor,
    coefficients: Tensor,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_n coefficients_n * lp_n to weight and bias (or empty)."""
    return torch.ops.synpo_fast_native.linear_logprobs_weight_grad(
        hidden,
        problem.weight,
        labels,
        problem.bias,
        problem.logit_scale,
        problem.softcap,
        logps,
        normalisers,
        coefficients,
        want_bias,
    )
