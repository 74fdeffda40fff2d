"""SynPO with a reference: SynPO's contrast, measured from the reference.

    G(y) = exp(mean_t lp_t)          Gref(y) = exp(mean_t ref_t)          A(y) = mean_t exp(lp_t)
    x    = alpha * ((G(y+) - Gref(y+)) - (G(y-) - Gref(y-)))
    L    = -link(x) - beta * A(y+)                  link is sigmoid or log sigmoid, as in synpo.py

The formula is ours: the SynPO paper (arXiv 2506.00835) has no reference, and no other paper states a form with one. We chose
this form because x differs from SynPO's only by a constant per pair:

- alpha keeps its scale, and the gradient with respect to token log-probs is SynPO's with the weight w taken at the new x;
- x is 0 for every pair if the policy equals the reference, so training starts on the steepest part of the link. SynPO's x
  starts at alpha * (Gref(y+) - Gref(y-)), where a pair that the reference separates well has almost no gradient left;
- the reward G(y) - Gref(y) stays in [-1, 1]. The alternative exp(mean_t (lp_t - ref_t)) is a ratio without an upper bound: one
  response that the reference finds unlikely would outweigh a batch.
"""

from __future__ import annotations

from torch import Tensor

from synpo_fast.losses.dpo_types.log_ratios import reference_sums
from synpo_fast.losses.pair import LossOutput, PairLogprobs, preference_output
from synpo_fast.losses.segments import arithmetic_mean, segment_lengths, segment_mean
from synpo_fast.losses.synpo import check_synpo_options, link_function


def synpo_ref(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    link: str = "sigmoid",
) -> LossOutput:
    """Loss of SynPO with a reference per pair. The log-probs in the output are means.

    reference: log-probs of the same responses, one per token or one sum per response, without grad. A sum is divided by the
        policy's number of tokens.
    Raises ValueError if alpha <= 0, beta < 0, or link is neither "sigmoid" nor "logsigmoid", and on a reference that is missing,
    requires grad, or holds other responses.
    """
    check_synpo_options(alpha, beta, link)
    if reference is None:
        raise ValueError("synpo_ref needs a reference; synpo is the loss without one")
    chosen_logps = segment_mean(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_mean(policy.rejected, policy.rejected_offsets)
    chosen_ref, rejected_ref = reference_sums(policy, reference)
    chosen_rewards = chosen_logps.exp() - mean_probability(chosen_ref, policy.chosen_offsets)
    rejected_rewards = rejected_logps.exp() - mean_probability(rejected_ref, policy.rejected_offsets)
    x = alpha * (chosen_rewards - rejected_rewards)
    A_chosen = arithmetic_mean(policy.chosen, policy.chosen_offsets)
    return preference_output(
        policy,
        -link_function(x, link) - beta * A_chosen,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )


def mean_probability(sums: Tensor, offsets: Tensor) -> Tensor:
    """Geometric mean probability from the summed log-probs of each response, [P]."""
    return (sums / segment_lengths(offsets).clamp(min=1)).exp()
