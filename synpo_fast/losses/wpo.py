"""WPO (arXiv 2406.11827): weights that are greater for pairs that the policy would write itself.

    a(y) = mean_t (lp_t - log sum_v p_t(v)^2)          w = exp(a(y+)) * exp(a(y-))

sum_v p^2 is the probability that two tokens drawn from the policy agree, so a response that was sampled from it has a(y) about 0
and a weight about 1; a response far from the policy has a weight near 0. This is the paper's alignment by sampling, as in TRL's
use_weighting. The weights are detached and multiply the preference term of a pair, not its NLL. TRL also multiplies the NLL of
its loss type "sft".
"""

from __future__ import annotations

import torch
from torch import Tensor

from synpo_fast.losses.pair import PairLogprobs
from synpo_fast.losses.segments import geometric_mean, upcast


@torch.no_grad()
def wpo_weights(policy: PairLogprobs, log_sum_sq_probs: PairLogprobs) -> Tensor:
    """The weight of each pair, detached, [P].

    log_sum_sq_probs: log of the sum over the vocabulary of the squared probabilities, for each token of the same responses.
    Raises ValueError if the two hold different numbers of pairs or tokens.
    """
    shapes = [(each.num_pairs, each.chosen.shape[0], each.rejected.shape[0]) for each in (policy, log_sum_sq_probs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"log_sum_sq_probs has (pairs, chosen tokens, rejected tokens) {shapes[1]}, the policy {shapes[0]}"
        )
    chosen = upcast(policy.chosen) - upcast(log_sum_sq_probs.chosen)
    rejected = upcast(policy.rejected) - upcast(log_sum_sq_probs.rejected)
    return geometric_mean(chosen, policy.chosen_offsets) * geometric_mean(rejected, policy.rejected_offsets)
