"""Rewards with autograd, as --diagnostics takes them, against the detached ones of each loss's output."""

import pytest
import torch

from synpo_fast.losses import LOSSES, preference_loss
from synpo_fast.losses.rewards import rewards_of

from . import truth

CASES = [*truth.CASES, ("dpo,sft", {"beta": 0.3}), ("sft,synpo,dpo", {"alpha": 3.0})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_rewards_are_those_of_the_output(name, options):
    lengths = [(3, 2), (1, 4)]
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(truth.ragged_pairs(lengths)))
    needs = any(LOSSES[member].reads_reference(options) for member in name.split(",") if member != "sft")
    reference = truth.as_logprobs(truth.ragged_pairs(lengths, seed=1)) if needs else None
    output = preference_loss(name, policy, reference, **options)
    rewards = rewards_of(name, policy, reference, options)
    torch.testing.assert_close(rewards[0].detach(), output.chosen_rewards, rtol=1e-12, atol=0)
    torch.testing.assert_close(rewards[1].detach(), output.rejected_rewards, rtol=1e-12, atol=0)
    torch.stack(rewards).sum().backward()
    assert (chosen.grad > 0).sum() >= 2 and (rejected.grad > 0).sum() >= 2
