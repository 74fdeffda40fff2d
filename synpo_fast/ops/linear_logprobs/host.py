"""Forward and backward of the host-driven backends (chunked, native): drop ignored rows, compute, scatter the results back.

Both backends supply the same functions, which work on valid rows only. This file handles `rows`, ignored labels and kept
exponentials.

The head's gradient of the first k rows, whose exponentials E were kept, is one product: dW = E^T (factor * hidden) with
factor_n = -c_n / b_n (see problem.Computed). The logits of the other rows are computed again.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import STATS, Computed, Problem, Wanted, direction_dtype, valid_rows


def forward(backend: ModuleType, problem: Problem, wanted: Wanted) -> Computed:
    """Computes the valid rows with the backend's forward_rows."""
    valid = valid_rows(problem)
    count, num_labels = valid.labels.numel(), problem.labels.shape[0]
    hidden = valid.gather_hidden(problem)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    computed = Computed(
        logps=hidden.new_empty(count, dtype=dtype),
        normalisers=hidden.new_empty(count, 2, dtype=dtype),
        direction=hidden.new_empty(
            count if wanted.direction else 0,
            hidden.shape[1],
            dtype=direction_dtype(hidden.dtype, wanted.logsumexp_grad),
        ),
        exponentials=hidden.new_empty(
            min(count, wanted.keep_rows), problem.weight.shape[0], dtype=backend.kept_dtype(hidden.dtype)
        ),
        stats=hidden.new_empty(count if wanted.stats else 0, len(STATS), dtype=dtype),
    )
    if wanted.bounded and wanted.keep_rows < count:
        _warn_once_that_logits_are_computed_again()
    if count:
        backend.forward_rows(problem, hidden, valid.labels, computed)
    stats = valid.spread(computed.stats, num_labels) if wanted.stats else computed.stats
    return Computed(
        valid.spread(computed.logps, num_labels), computed.normalisers, computed.direction, computed.exponentials, stats
    )


@functools.cache
def _warn_once_that_logits_are_computed_again() -> None:
    warnings.warn(
        "the exponentials of a batch exceed keep_bytes, so the logits of the remaining rows are computed again for the head's "
        "gradient (8NDV instead of 6NDV); increase keep_bytes if memory allows",
        stacklevel=2,
    )


def backward(
    backend: ModuleType, problem: Problem, grad_logps: Tensor, computed: Computed, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden [M, D] (in the direction's dtype), weight and bias; None where `needs` is False.

    The tensors of `computed` may be padded.
    """
    valid = valid_rows(problem)
    count = valid.labels.numel()
    coefficients = valid.gather(grad_logps).contiguous()
    grad_hidden: Tensor | None = None
    if needs[0]:
        direction = computed.direction[:count]
        scaled = torch.mul(direction, coefficients[:, None], out=torch.empty_like(direction))
        grad_hidden = valid.scatter_hidden(scaled, problem)
    if not (needs[1] or needs[2]):
        return grad_hidden, None, None
    if count == 0:
        grad_weight = problem.weight.new_zeros(problem.weight.shape)
        return grad_hidden, grad_weight if needs[1] else None, grad_weight[:, 0].clone() if needs[2] else None
    hidden, normalisers = valid.gather_hidden(problem), computed.normalisers[:count]
    kept = min(count, computed.exponentials.shape[0])
    parts = []
    if kept < count:
        rest = slice(kept, None)
        parts.append(
            backend.weight_grad_rows(
                problem, hidden[rest], valid.labels[rest], valid.gather(computed.logps)[rest], normalisers[rest],
                coefficients[rest], needs[2],
            )
        )  # fmt: skip
    if kept:
        parts.append(
            weight_grads_of_exponentials(
                problem,
                hidden[:kept],
                normalisers[:kept],
                computed.exponentials[:kept],
                coefficients[:kept, None],
                needs[2],
            )
        )
    grad_weight, grad_bias = parts[0]
    for more_weight, more_bias in parts[1:]:
        grad_weight.add_(more_weight)
        grad_bias.add_(more_bias)
    return grad_hidden, grad_weight if needs[1] else None, grad_bias if needs[2] else None


def weight_grads_of_exponentials(
    problem: Problem, hidden: Tensor, normalisers: Tensor, exponentials: Tensor, c: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor]:
    """Returns dW = E^T (factor * hidden) and db (or empty); factor = -c / b, times logit_scale where E lacks the slope."""
    factor = -c / normalisers[:, 1:]
    if problem.softcap is None:
        factor = factor * problem.logit_scale
    assert exponentials.dtype != torch.float16, "late in training a factor is below fp16's smallest number"
    grad_weight = torch.mm(exponentials.t(), (hidden * factor).to(exponentials.dtype))
    grad_bias = problem.weight.new_empty(0)
    if want_bias:
        grad_bias = (factor.to(exponentials.dtype).t() @ exponentials).squeeze(0)
        grad_bias = grad_bias.to(problem.weight.dtype)
    return grad_weight.to(problem.weight.dtype), grad_bias
