"""Negative log-likelihood of the chosen response or the ground truth, and the auxiliary loss term built from it.

    token_mean         NLL_i = -sum_t lp_t / T_i                   LongVPO, and gDPO with one pair per batch
    batch_token_mean   NLL_i = -P * sum_t lp_t / sum_j T_j         its mean over the pairs is the token mean of the batch
    sum                NLL_i = -sum_t lp_t

batch_token_mean weights a pair by its length and depends on the other pairs in the batch, so gradient accumulation changes
it. It equals cross-entropy with reduction "mean" in TRL, Liger and the ORPO authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from synpo_fast.losses.checks import check_choice, check_number
from synpo_fast.losses.pair import PairLogprobs, host_can_read
from synpo_fast.losses.segments import segment_lengths, segment_sum

TARGETS = ("chosen", "ground_truth")
REDUCES = ("token_mean", "batch_token_mean", "sum")


@dataclass(frozen=True)
class AuxiliaryNLL:
    """An NLL term, weight * NLL(target), that is added to the loss of every pair.

    Args:
        target: "chosen" or "ground_truth".
        weight: LongVPO uses 1 with chosen, gDPO uses 0.1 with ground_truth.
        reduce: "sum", "token_mean" (per response) or "batch_token_mean" (over the batch's tokens).

    Raises ValueError on an unknown target or reduce and on weight < 0.
    """

    target: str = "chosen"
    weight: float = 1.0
    reduce: str = "token_mean"

    def __post_init__(self) -> None:
        check_choice("target", self.target, TARGETS)
        check_number("weight", self.weight, at_least=0.0)
        check_choice("reduce", self.reduce, REDUCES)


def nll(policy: PairLogprobs, *, target: str = "chosen", reduce: str = "token_mean") -> Tensor:
    """NLL of each pair's target, [P], with autograd.

    An undesirable unpaired row has no chosen response: its NLL is 0.
    Raises ValueError on an unknown target or reduce, a missing ground truth, and, on the CPU, an empty target. On other
    devices an empty target has NLL 0.
    """
    check_choice("target", target, TARGETS)
    check_choice("reduce", reduce, REDUCES)
    logps, offsets = (
        (policy.chosen, policy.chosen_offsets)
        if target == "chosen"
        else (policy.ground_truth, policy.ground_truth_offsets)
    )
    if logps is None or offsets is None:
        raise ValueError("target is 'ground_truth', but the policy log-probs hold no ground_truth")
    lengths = segment_lengths(offsets)
    empty = lengths == 0
    if target == "chosen" and policy.unpaired is not None:
        empty = empty & ~policy.unpaired
    if host_can_read(offsets) and bool(empty.any()):
        raise ValueError(f"{target} response of pair {int(empty.nonzero()[0])} is empty")
    sums = segment_sum(logps, offsets)
    if reduce == "token_mean":
        return -sums / lengths.clamp(min=1)
    if reduce == "batch_token_mean":
        return -sums * policy.num_pairs / offsets[-1].clamp(min=1)
    return -sums
