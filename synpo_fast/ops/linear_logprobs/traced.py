"""The op as two opaque operators whose output shapes are known, for torch.compile and for tensors without values."""

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.backends import backward, choose_at_run_time, forward
from synpo_fast.ops.linear_logprobs.problem import STATS, Computed, Problem, Wanted, direction_dtype


def is_traced(hidden: Tensor) -> bool:
    """True under torch.compile and for tensors without values: the work is then one opaque operator with known output shapes."""
    if torch.compiler.is_compiling() or hidden.device.type == "meta":
        return True
    return type(hidden).__name__ == "FakeTensor"


def _padded(values: Tensor, num_rows: int) -> Tensor:
    """Pads [n, ...] to [num_rows, ...]: the output shapes of a traced operator must not depend on the labels' values."""
    if values.shape[0] == num_rows:
        return values
    return torch.cat([values, values.new_zeros(num_rows - values.shape[0], *values.shape[1:])])


@torch.library.custom_op("synpo_fast::linear_logprobs_forward", mutates_args=())
def traced_forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None,
    logit_scale: float, softcap: float | None, ignore_index: int, direction: bool, keep_rows: int, bounded: bool, stats: bool,
    logsumexp_grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
    computed = forward(
        problem, Wanted(direction, keep_rows, bounded, stats, logsumexp_grad), choose_at_run_time(hidden, backend)
    )
    num_labels, vocabulary = labels.shape[0], weight.shape[0]
    return (
        computed.logps,
        _padded(computed.normalisers, num_labels),
        _padded(computed.direction, num_labels if direction else 0),
        _padded(computed.exponentials[:, :vocabulary].contiguous(), keep_rows),
        computed.stats,
    )


@traced_forward.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    rows,
    logit_scale,
    softcap,
    ignore_index,
    direction,
    keep_rows,
    bounded,
    stats,
    logsumexp_grad,
    backend,
):
    logps = hidden.new_empty(labels.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (
        logps,
        logps.new_empty(labels.shape[0], 2),
        hidden.new_empty(
            labels.shape[0] if direction else 0, hidden.shape[1], dtype=direction_dtype(hidden.dtype, logsumexp_grad)
        ),
        hidden.new_empty(keep_rows, weight.shape[0]),
        logps.new_empty(labels.shape[0] if stats else 0, len(STATS)),
    )


@torch.library.custom_op("synpo_fast::linear_logprobs_backward", mutates_args=())
def traced_backward(
    grad_logps: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None,
    logps: Tensor, normalisers: Tensor, direction: Tensor, exponentials: Tensor, logit_scale: float, softcap: float | None,
    ignore_index: int, needs_hidden: bool, needs_weight: bool, needs_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
    needs = (needs_hidden, needs_weight, needs_bias)
    computed = Computed(logps, normalisers, direction, exponentials, logps.new_empty(0, len(STATS)))
    grads = backward(problem, grad_logps, computed, needs, choose_at_run_time(hidden, backend))
    gh, gw, gb = (hidden.new_empty(0) if grad is None else grad for grad in grads)
    return gh, gw, gb


@traced_backward.register_fake
def _(
    grad_logps, hidden, weight, labels, bias, rows, logps, normalisers, direction, exponentials, logit_scale, softcap,
    ignore_index, needs_hidden, needs_weight, needs_bias, backend,
):  # fmt: skip
    return (
        torch.empty_like(hidden, dtype=direction.dtype, memory_format=torch.contiguous_format)
        if needs_hidden
        else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0]) if needs_bias else hidden.new_empty(0),
    )
