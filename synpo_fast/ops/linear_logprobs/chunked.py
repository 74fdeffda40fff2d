"""Backend "chunked": token log-probs in plain torch on any device, in tiles of rows x whole vocabulary with reused buffers.

A tile holds the logits of `rows_per_tile` rows. Its exponentials are multiplied with W right away, which gives the
direction d lp / d hidden = (1 - p) z' W[y] - sum over v != y of p_v z'_v W[v]. This costs 4*N*D*V in total, and 2*N*D*V without
a gradient. The target logit is a separate fp32 dot product, and the target is excluded from the sums, so that lp <= 0 and a
confident token keeps its gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import Problem

TILE_BYTES = 64 * 2**20


def rows_per_tile(num_rows: int, vocabulary: int, element_size: int) -> int:
    """Number of rows whose logits fill TILE_BYTES, counting one buffer in the input's dtype and one in fp32."""
    return max(1, min(num_rows, TILE_BYTES // (vocabulary * (element_size + 4))))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(
    problem: Problem, hidden: Tensor, labels: Tensor, kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yields for each tile: slice, labels [r, 1], logits [r, V] and target logits [r, 1] in fp32, raw [r, V] in hidden's dtype.

    `logits` and `raw` are buffers that the caller may overwrite and that the next tile reuses. With `kept` [n, V], raw is a
    view of its rows instead.
    """
    weight, bias, vocabulary = problem.weight, problem.bias, problem.weight.shape[0]
    dtype = _accumulator(hidden.dtype)
    height = rows_per_tile(hidden.shape[0], vocabulary, hidden.element_size())
    raw_buffer = hidden.new_empty(height, vocabulary) if kept is None else None
    if raw_buffer is not None and dtype == hidden.dtype:
        logits_buffer = raw_buffer
    else:
        logits_buffer = hidden.new_empty(height, vocabulary, dtype=dtype)
    for begin in range(0, hidden.shape[0], height):
        part = slice(begin, min(begin + height, hidden.shape[0]))
        label, rows = labels[part, None], hidden[part]
        raw = raw_buffer[: rows.shape[0]] if raw_buffer is not None else kept[part]  # type: ignore[index]
        torch.mm(rows, weight.t(), out=raw)
        logits = logits_buffer[: rows.shape[0]]
        if logits.data_ptr() != raw.data_ptr():
            logits.copy_(raw)
        target = (rows.to(dtype) * weight[label.squeeze(1)].to(dtype)).sum(1, keepdim=True)
        if bias is not None:
            logits += bias
            target += bias[label]
        logits *= problem.logit_scale
        if problem.softcap is not None:
            logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
        yield part, label, logits, problem.logits(target), raw


def forward_rows(
    problem: Problem, hidden: Tensor, labels: Tensor, want_direction: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n, D], labels [n], all valid -> log-probs [n], normalisers [n, 2], direction [n, D] (or empty)."""
    return _forward(problem, hidden, labels, want_direction, None)


def forward_rows_kept(problem: Problem, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the results of forward_rows (with the direction) and the exponentials [n, V] that kept.py describes."""
    exponentials = hidden.new_empty(hidden.shape[0], problem.weight.shape[0])
    return *_forward(problem, hidden, labels, True, exponentials), exponentials


def _forward(
    problem: Problem, hidden: Tensor, labels: Tensor, want_direction: bool, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(hidden.dtype)
    logps = hidden.new_empty(labels.shape, dtype=dtype)
    normalisers = logps.new_empty(labels.shape[0], 2)
    direction = torch.empty_like(hidden) if want_direction else hidden.new_empty(0, hidden.shape[1])
    for part, label, logits, target, raw in _tiles(problem, hidden, labels, kept):
        logits.scatter_(1, label, -torch.inf)
        top = torch.maximum(logits.amax(1, keepdim=True), target)
        slope = problem.slope(logits) if want_direction and problem.softcap is not None else None
        exponentials = logits.sub_(top).exp_()
        others = exponentials.sum(1, keepdim=True)
        at_target = (target - top).exp()
        total = others + at_target
        logps[part] = torch.where(target == top, -others.log1p(), (target - top) - total.log()).squeeze(1)
        normalisers[part] = torch.cat([top, total], 1)
        if not want_direction:
            continue
        if slope is not None:
            exponentials.mul_(slope).scatter_(1, label, 0.0)
        scale = problem.logit_scale if slope is None else 1.0
        pulled = torch.mm(raw.copy_(exponentials), problem.weight).to(dtype)
        pulled *= scale / total
        pushed = problem.weight[label.squeeze(1)].to(dtype) * (others / total * problem.slope(target))
        direction[part] = pushed.sub_(pulled)
        if kept is not None:
            raw.scatter_(1, label, (-others * problem.slope(target) / scale).to(raw.dtype))
    return logps, normalisers, direction


def weight_grad_rows(
    problem: Problem,
    hidden: Tensor,
    labels: Tensor,
    logps: Tensor,
    normalisers: Tensor,
    coefficients: Tensor,
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_n coefficients_n * lp_n to weight and bias (or empty). Recomputes the logits and sums in fp32."""
    dtype = _accumulator(hidden.dtype)
    # Late in SynPO training a coefficient can be below fp16's smallest number, so the products use c / max |c|.
    peak = coefficients.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    coefficients = coefficients / peak
    grad_weight = problem.weight.new_zeros(problem.weight.shape, dtype=dtype)
    grad_bias = grad_weight.new_zeros(problem.weight.shape[0] if want_bias else 0)
    for part, label, logits, target, raw in _tiles(problem, hidden, labels):
        slope = problem.slope(logits)
        top, total = normalisers[part].split(1, 1)
        grads = logits.sub_(top).exp_().mul_(slope).mul_(-coefficients[part, None] / total)
        at_target = -logps[part, None].expm1() * problem.slope(target) * coefficients[part, None]
        grads.scatter_(1, label, at_target)
        grad_weight += torch.mm(raw.copy_(grads).t(), hidden[part])
        if want_bias:
            grad_bias += grads.sum(0)
    return grad_weight.mul_(peak).to(problem.weight.dtype), grad_bias.mul_(peak).to(problem.weight.dtype)
