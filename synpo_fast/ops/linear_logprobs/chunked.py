"""Backend "chunked": token log-probs in plain torch on any device, in tiles of rows x whole vocabulary with reused buffers.

A tile holds the logits of `rows_per_tile` rows. Its exponentials are multiplied with W right away, which gives the
direction d lp / d hidden = (1 - p) z' W[y] - sum over v != y of p_v z'_v W[v]. This costs 4*N*D*V in total, and 2*N*D*V without
a gradient. The target logit is a separate fp32 dot product, and the target is excluded from the sums, so that lp <= 0 and a
confident token keeps its gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import Computed, Problem

SMALL_TILE, LARGE_TILE = 64 * 2**20, 2**30  # bytes
SHARE_OF_LOGITS = 20


def rows_per_tile(num_rows: int, vocabulary: int, dtype: torch.dtype, device_type: str) -> int:
    """Number of rows whose logits fill a tile, counting one buffer in the input's dtype and, for 16-bit inputs, one in fp32.

    A tile takes SMALL_TILE bytes on a CPU. On other devices it may take a share of full fp32 logits (5 %), because every tile
    reads all of W twice, and few rows leave the products waiting for that.
    """
    buffers = {dtype, _accumulator(dtype)}
    allowed = SMALL_TILE
    if device_type != "cpu":
        allowed = min(max(allowed, num_rows * vocabulary * 4 // SHARE_OF_LOGITS), LARGE_TILE)
    return max(1, min(num_rows, allowed // (vocabulary * sum(each.itemsize for each in buffers))))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(
    problem: Problem, hidden: Tensor, labels: Tensor, kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yields for each tile: slice, labels [r, 1], logits [r, V] and target logits [r, 1] in fp32, raw [r, V] in hidden's dtype.

    `logits` and `raw` are buffers that the caller may overwrite and that the next tile reuses. In the first k rows raw is a
    view of the rows of `kept` [k, V] instead.
    """
    weight, bias, vocabulary = problem.weight, problem.bias, problem.weight.shape[0]
    dtype = _accumulator(hidden.dtype)
    height = rows_per_tile(hidden.shape[0], vocabulary, hidden.dtype, hidden.device.type)
    num_kept = 0 if kept is None else kept.shape[0]
    raw_buffer = hidden.new_empty(height if num_kept < hidden.shape[0] else 0, vocabulary)
    logits_buffer = hidden.new_empty(height, vocabulary, dtype=dtype) if dtype != hidden.dtype else None
    for begin, end in _bounds(hidden.shape[0], num_kept, height):
        part = slice(begin, end)
        label, rows = labels[part, None], hidden[part]
        raw = kept[part] if kept is not None and end <= num_kept else raw_buffer[: rows.shape[0]]
        torch.mm(rows, weight.t(), out=raw)
        logits = raw if logits_buffer is None else logits_buffer[: rows.shape[0]].copy_(raw)
        target = (rows.to(dtype) * weight[label.squeeze(1)].to(dtype)).sum(1, keepdim=True)
        if bias is not None:
            logits += bias
            target += bias[label]
        logits *= problem.logit_scale
        if problem.softcap is not None:
            logits.div_(problem.softcap).tanh_().mul_(problem.softcap)
        yield part, label, logits, problem.logits(target), raw


def _bounds(num_rows: int, num_kept: int, height: int) -> Iterator[tuple[int, int]]:
    """Yields the first row of each tile and the row after its last. No tile has both kept and other rows."""
    begin = 0
    while begin < num_rows:
        end = min(begin + height, num_kept if begin < num_kept else num_rows)
        yield begin, end
        begin = end


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of kept exponentials."""
    return dtype


def forward_rows(problem: Problem, hidden: Tensor, labels: Tensor, computed: Computed) -> None:
    """Fills the tensors of `computed` that are not empty, for hidden [n, D] and labels [n], all valid."""
    want_direction, kept = computed.direction.shape[0] > 0, computed.exponentials
    with_slope = problem.softcap is not None and (want_direction or kept.shape[0] > 0)
    for part, label, logits, target, raw in _tiles(problem, hidden, labels, kept):
        logits.scatter_(1, label, -torch.inf)
        top = torch.maximum(logits.amax(1, keepdim=True), target)
        slope = problem.slope(logits) if with_slope else None
        exponentials = logits.sub_(top).exp_()
        others = exponentials.sum(1, keepdim=True)
        at_target = (target - top).exp()
        total = others + at_target
        computed.logps[part] = torch.where(target == top, -others.log1p(), (target - top) - total.log()).squeeze(1)
        computed.normalisers[part] = torch.cat([top, total], 1)
        if computed.stats.shape[0]:
            computed.stats[part] = _stats(exponentials, at_target, top, total)
        if not (want_direction or part.stop <= kept.shape[0]):
            continue
        if slope is not None:
            exponentials.mul_(slope).scatter_(1, label, 0.0)
        scale = problem.logit_scale if slope is None else 1.0
        # Beside a confident target the others' exponentials are below fp16's smallest number: the largest becomes 1.
        largest: Tensor | float = 1.0
        if raw.dtype == torch.float16:
            largest = exponentials.abs().amax(1, keepdim=True).clamp_min(torch.finfo(total.dtype).tiny)
            exponentials.div_(largest)
        raw.copy_(exponentials)
        if want_direction:
            pulled = torch.mm(raw, problem.weight).to(total.dtype)
            pulled *= largest * scale / total
            pushed = problem.weight[label.squeeze(1)].to(total.dtype) * (others / total * problem.slope(target))
            computed.direction[part] = pushed.sub_(pulled)
        if part.stop <= kept.shape[0]:
            raw.scatter_(1, label, (-others * problem.slope(target) / scale).to(raw.dtype))


def _stats(exponentials: Tensor, at_target: Tensor, top: Tensor, total: Tensor) -> Tensor:
    """The columns of STATS, [r, 4], from the exponentials of the other tokens [r, V] and of the target [r, 1]."""
    log_total = total.log()
    minus_weighted = torch.special.entr(exponentials).sum(1, keepdim=True) + torch.special.entr(at_target)
    squares = torch.linalg.vector_norm(exponentials, dim=1, keepdim=True).square() + at_target.square()
    entropy = log_total + minus_weighted / total
    return torch.cat([top + log_total, entropy, (at_target == 1).to(top.dtype), squares.log() - 2 * log_total], 1)


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
    # Late in SynPO training c (1 - p) can be below fp16's smallest number, so the products use c / max |c (1 - p)|.
    peak = (coefficients * logps.expm1()).abs().amax()
    # Where every log-prob rounds to 0, all products are 0, and c / peak must not overflow.
    peak = peak.clamp_min(coefficients.abs().amax() * 2.0**-40).clamp_min(torch.finfo(torch.float32).tiny)
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
