"""Rewards with autograd. A LossOutput has the same values, detached.

`--diagnostics` measures the gradients of these rewards. REWARDS is keyed by the formula in a loss's entry (LossSpec.reward).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from synpo_fast.losses.dpo_types.log_ratios import log_ratios, reference_sums
from synpo_fast.losses.pair import PairLogprobs
from synpo_fast.losses.segments import geometric_mean, segment_mean, segment_sum
from synpo_fast.losses.spec import Options
from synpo_fast.losses.synpo_ref import mean_probability
from synpo_fast.losses.weighted_sum import spec_of

Rewards = tuple[Tensor, Tensor]


def rewards_of(name: str, policy: PairLogprobs, reference: PairLogprobs | None, options: Options) -> Rewards:
    """The rewards of the chosen and of the rejected responses, [P] each, for a loss or a sum of losses.

    options: the loss's options; those that are missing have the loss's defaults.
    """
    spec = spec_of(name)
    return REWARDS[spec.reward](policy, reference, {**spec.options, **options})


def _scaled(reduce: Callable[[Tensor, Tensor], Tensor], policy: PairLogprobs, scale: float) -> Rewards:
    chosen = reduce(policy.chosen, policy.chosen_offsets)
    return scale * chosen, scale * reduce(policy.rejected, policy.rejected_offsets)


def _log_ratio_rewards(policy: PairLogprobs, reference: PairLogprobs | None, options: Options) -> Rewards:
    return log_ratios(
        "this loss",
        policy,
        reference,
        beta=options["beta"],
        ld_alpha=options.get("ld_alpha", 1.0),
        reference_free=reference is None,
    ).rewards


def _probability_gains(policy: PairLogprobs, reference: PairLogprobs | None, options: Options) -> Rewards:
    assert reference is not None
    sums = reference_sums(policy, reference)
    chosen, rejected = _scaled(geometric_mean, policy, 1.0)
    return (
        chosen - mean_probability(sums[0], policy.chosen_offsets),
        rejected - mean_probability(sums[1], policy.rejected_offsets),
    )


REWARDS: dict[str, Callable[[PairLogprobs, PairLogprobs | None, Options], Rewards]] = {
    "G": lambda policy, reference, options: _scaled(geometric_mean, policy, 1.0),
    "G - Gref": _probability_gains,
    "beta*m": lambda policy, reference, options: _scaled(segment_mean, policy, options["beta"]),
    "beta*S": lambda policy, reference, options: _scaled(segment_sum, policy, options["beta"]),
    "beta*r": _log_ratio_rewards,
}
