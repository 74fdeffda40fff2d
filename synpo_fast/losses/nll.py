"""Negative log-likelihood of the chosen response or the ground truth, and the auxiliary loss term built from it.

    token_mean         NLL_i = -sum_t lp_t / T_i                   LongVPO, and gDPO with one pair per batch
    batch_token_mean   NLL_i = -P * sum_t lp_t / sum_j T_j         its mean over the pairs is the token mean of the batch
    sum                NLL_i = -sum_t lp_t

batch_token_mean weights a pair by its length and depends on the other pairs in the batch, so gradient accumulation changes
it. It equals cross-entropy with reduction "mean" in TRL, Liger and the ORPO authors' code.

`token_penalties` adds to a token's -lp what supervised training often adds, from numbers that the op returns with the log-prob:

    label smoothing   eps * (lp_t - mean_v log p_t(v)),   so that eps of the target's mass lies on all words alike
    z-loss            w * logsumexp_t^2,                  which keeps logits from drifting

where mean_v log p is the mean logit minus logsumexp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class TokenPenalties:
    """Terms that are added to the NLL of every token of the chosen response.

    Args:
        label_smoothing: the share of the target that lies on all words of the vocabulary alike, as in torch's cross_entropy.
        z_loss: weight of logsumexp^2, PaLM's auxiliary loss (1e-4 there).

    Raises ValueError unless 0 <= label_smoothing < 1 and z_loss >= 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def needs_logsumexp(self) -> bool:
        """True if a penalty reads logsumexp, with a gradient."""
        return self.label_smoothing > 0 or self.z_loss > 0

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing, at_least=0.0, below=1.0)
        check_number("z_loss", self.z_loss, at_least=0.0)


def token_penalties(logps: Tensor, logsumexp: Tensor, mean_logits: Tensor | None, penalties: TokenPenalties) -> Tensor:
    """The penalty of each token, with autograd. All tensors have one shape; mean_logits is read by label smoothing only."""
    total = penalties.z_loss * logsumexp.square() if penalties.z_loss else torch.zeros_like(logps)
    if penalties.label_smoothing:
        assert mean_logits is not None
        total = total + penalties.label_smoothing * (logps + logsumexp - mean_logits)
    return total


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
