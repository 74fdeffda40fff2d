"""Triton kernel of synpo_pair_loss: one program per pair, one launch per batch, no host synchronisation."""

import triton
import triton.language as tl


@triton.jit
def _segment_statistics(logps, mask, begin, end, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the number of tokens, the sum of lp and the sum of exp(lp) of one response."""
    count = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    likelihood = tl.zeros([BLOCK], tl.float32)
    for at in range(begin, end, BLOCK):
        t = at + tl.arange(0, BLOCK)
        counted = t < end
        if HAS_MASK:
            counted = counted & (tl.load(mask + t, mask=counted, other=0) != 0)
        lp = tl.load(logps + t, mask=counted, other=0.0)
        count += counted.to(tl.float32)
        total += lp
        likelihood += tl.where(counted, tl.exp(lp), 0.0)
    return tl.sum(count, 0), tl.sum(total, 0), tl.sum(likelihood, 0)


@triton.jit
def _store_coefficients(
    logps, mask, coefficients, begin, end, constant, slope, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores constant + slope * exp(lp) for each token that counts, 0 for the others."""
    for at in range(begin, end, BLOCK):
        t = at + tl.arange(0, BLOCK)
        counted = t < end
        if HAS_MASK:
            counted = counted & (tl.load(mask + t, mask=counted, other=0) != 0)
        lp = tl.load(logps + t, mask=counted, other=0.0)
        tl.store(coefficients + t, tl.where(counted, constant + slope * tl.exp(lp), 0.0), mask=t < end)


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) without overflow; for large negative x it keeps its relative precision."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _synpo_pair_loss_forward_kernel(
    logps, mask, chosen_offsets, rejected_offsets, losses, statistics, coefficients, num_empty, num_pairs, alpha, beta,
    LOGSIGMOID: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    chosen_begin, chosen_end = tl.load(chosen_offsets + pair), tl.load(chosen_offsets + pair + 1)
    rejected_begin, rejected_end = tl.load(rejected_offsets + pair), tl.load(rejected_offsets + pair + 1)
    T_chosen, sum_chosen, likelihood = _segment_statistics(logps, mask, chosen_begin, chosen_end, HAS_MASK, BLOCK)
    T_rejected, sum_rejected, _ = _segment_statistics(logps, mask, rejected_begin, rejected_end, HAS_MASK, BLOCK)
    empty = (T_chosen == 0) | (T_rejected == 0)
    T_chosen, T_rejected = tl.maximum(T_chosen, 1.0), tl.maximum(T_rejected, 1.0)

    mean_chosen, mean_rejected = sum_chosen / T_chosen, sum_rejected / T_rejected
    G_chosen, G_rejected, A_chosen = tl.exp(mean_chosen), tl.exp(mean_rejected), likelihood / T_chosen
    x = alpha * (G_chosen - G_rejected)
    if LOGSIGMOID:
        # log sigmoid(x) = min(x, 0) - log(1 + e) with e = exp(-|x|); where e is small, log(1 + e) is taken from its series
        e = tl.exp(-tl.abs(x))
        small = e * (1.0 - e * (0.5 - e * (0.3333333333 - e * (0.25 - e * 0.2))))
        link = tl.minimum(x, 0.0) - tl.where(e < 0.03125, small, tl.log(1.0 + e))
        w = _sigmoid(-x)
    else:
        link = _sigmoid(x)
        w = _sigmoid(x) * _sigmoid(-x)
    keep = tl.where(empty, 0.0, 1.0)
    tl.store(losses + pair, keep * (-link - beta * A_chosen))
    tl.store(statistics + pair, keep * mean_chosen)
    tl.store(statistics + num_pairs + pair, keep * mean_rejected)
    tl.store(statistics + 2 * num_pairs + pair, keep * G_chosen)
    tl.store(statistics + 3 * num_pairs + pair, keep * G_rejected)
    tl.store(statistics + 4 * num_pairs + pair, keep * A_chosen)
    tl.atomic_add(num_empty, tl.where(empty, 1, 0))
    _store_coefficients(
        logps, mask, coefficients, chosen_begin, chosen_end,
        -keep * alpha * w * G_chosen / T_chosen, -keep * beta / T_chosen, HAS_MASK, BLOCK,
    )  # fmt: skip
    _store_coefficients(
        logps, mask, coefficients, rejected_begin, rejected_end,
        keep * alpha * w * G_rejected / T_rejected, 0.0, HAS_MASK, BLOCK,
    )  # fmt: skip
