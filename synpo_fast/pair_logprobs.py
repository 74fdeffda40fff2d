"""Converts the log-probs of encoded rows to the tensors that losses read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.errors import UserError
from synpo_fast.losses import PairLogprobs
from synpo_fast.models.policy import Logps


def pair_logprobs(
    pairs: Sequence[EncodedPair], logps: Logps, *, all_sft: bool = False, kl: Tensor | None = None
) -> PairLogprobs:
    """Converts the log-probs of each response of each row to the flat tensors that losses read: one pair per comparison or label.

    all_sft: the loss reads only the better response of each comparison. kl: kto's reference point."""
    couples: list[tuple[Tensor, Tensor]] = []
    truths, preference, unpaired = [], [], []
    for pair, responses in zip(pairs, logps, strict=True):
        empty = responses[0][:0]
        for better, worse in pair.pairs:
            worse = None if all_sft else worse
            couples.append(
                (empty if better is None else responses[better], empty if worse is None else responses[worse])
            )
        preference += [pair.preference and not all_sft] * pair.num_pairs
        unpaired += [bool(pair.labels) and not all_sft] * pair.num_pairs
        if pair.ground_truth is not None:
            truths += [responses[pair.ground_truth]] * pair.num_pairs
    if truths and len(truths) != len(couples):
        without = sum(pair.ground_truth is None for pair in pairs)
        raise UserError(f"{without} of {len(pairs)} pairs of a micro-batch have no ground truth")
    return PairLogprobs.from_pairs(
        couples,
        ground_truth=truths or None,
        preference=None if all(preference) else preference,
        unpaired=unpaired if any(unpaired) else None,
        kl=kl,
    )


@torch.no_grad()
def mismatched_log_ratios(pairs: Sequence[EncodedPair], logps: Logps, reference: Logps) -> tuple[Tensor, int]:
    """The sum over mismatched responses of (log-prob under the policy - log-prob under the reference), fp64, and their number."""
    total, count = torch.zeros((), dtype=torch.float64, device=logps[0][0].device), 0
    for pair, own, ref in zip(pairs, logps, reference, strict=True):
        if pair.mismatched is not None:
            total += own[pair.mismatched].sum() - ref[pair.mismatched].sum()
            count += 1
    return total, count
