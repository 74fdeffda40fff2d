"""AOT (arXiv 2406.05882): compares the distributions of a batch's log-probs by sorting them, not pair by pair.

    aot            u = sort(S(y+) - S(y-))     v = sort(ref S(y+) - ref S(y-))
    aot_unpaired   u = sort(r(y+))             v = sort(r(y-))
    L_k = -(1 - eps) * log sigmoid(beta * (u_k - v_k)) - eps * log sigmoid(-beta * (u_k - v_k))

S is the sum of a response's log-probs, r the log-ratio to the reference, eps = label_smoothing. The k-th values of both lists
are compared. The loss of rank k is given to the pair whose u has rank k, so the mean over the batch is TRL's, and a pair's loss
moves its own log-probs.

The batch is what one call gets: in the trainer a micro-batch of one device. Pairs that are not compared are not sorted. With one
pair both losses are dpo.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.losses.checks import check_label_smoothing
from synpo_fast.losses.dpo_types.log_ratios import LogRatios, log_ratios
from synpo_fast.losses.pair import LossOutput, PairLogprobs, compared_pairs


def aot(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float = 1.0,
) -> LossOutput:
    """AOT loss of a batch of pairs, one value per pair. It has no reference_free form: that would be dpo's.

    Raises ValueError on label_smoothing outside [0, 0.5) and on pairs with weights; other arguments and errors as in dpo.
    """
    r = log_ratios("aot", policy, reference, beta=beta, ld_alpha=ld_alpha)
    u, v = r.chosen_logps - r.rejected_logps, r.chosen_ref - r.rejected_ref
    return _sorted_loss("aot", r, u, v, label_smoothing)


def aot_unpaired(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """AOT loss of a batch whose chosen and rejected responses need not belong together, one value per pair.

    Raises ValueError on label_smoothing outside [0, 0.5) and on pairs with weights; other arguments and errors as in dpo.
    """
    r = log_ratios("aot_unpaired", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    return _sorted_loss("aot_unpaired", r, r.chosen, r.rejected, label_smoothing)


def _sorted_loss(name: str, r: LogRatios, u: Tensor, v: Tensor, label_smoothing: float) -> LossOutput:
    check_label_smoothing(label_smoothing, "sigmoid")
    if r.policy.weights is not None:
        raise ValueError(
            f"{name} compares sorted values, which belong to no pair: a weight per pair has no meaning for it"
        )
    compared = compared_pairs(r.policy)

    def order_of(values: Tensor) -> Tensor:
        return torch.where(compared, values.detach(), torch.inf).argsort(stable=True)

    order = order_of(u)
    z = r.beta * (u[order] - v[order_of(v)])
    by_rank = -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return r.output(torch.zeros_like(by_rank).index_copy(0, order, by_rank))
