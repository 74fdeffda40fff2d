"""The unit a loss names for its numbers, against how those numbers change when tokens, beta or the reference do."""

import pytest
import torch

from synpo_fast.losses import LOSSES, PairLogprobs, preference_loss
from synpo_fast.losses.units import describe_units, logps_unit, loss_unit, reward_unit

CHOSEN, REJECTED = torch.tensor([-0.5, -1.0, -0.3]), torch.tensor([-2.0, -0.7])


def numbers(name, *, repeat=1, beta=None, shift=0.0):
    """(reward, log-prob) of the chosen response. repeat: every token so often; shift: added to each of the reference's."""
    policy = PairLogprobs.from_pairs([(CHOSEN.repeat(repeat), REJECTED.repeat(repeat))], kl=torch.tensor(0.2))
    reference = None
    if LOSSES[name].needs_reference:
        reference = PairLogprobs.from_pairs([((CHOSEN * 1.5 + shift).repeat(repeat), (REJECTED * 1.5).repeat(repeat))])
    output = preference_loss(name, policy, reference, **({} if beta is None else {"beta": beta}))
    return float(output.chosen_rewards), float(output.chosen_logps)


@pytest.mark.parametrize("name", LOSSES)
def test_units_say_what_the_numbers_are(name):
    reward, logps = numbers(name)
    longer_reward, longer_logps = numbers(name, repeat=2)
    scale = {"nats per token": 1, "nats per response": 2}[logps_unit(name)]
    assert longer_logps == pytest.approx(scale * logps)
    unit = reward_unit(name)
    per_token = "per token" in unit or unit.startswith("probability")
    assert longer_reward == pytest.approx(reward if per_token else 2 * reward)
    assert (unit == "probability") == (reward > 0 and reward == pytest.approx(float(CHOSEN.mean().exp())))
    default = LOSSES[name].options["beta"]
    doubled, _ = numbers(name, beta=2 * default)
    assert doubled == pytest.approx(2 * reward if "beta" in unit else reward)
    if "beta" in unit:
        assert unit.endswith(f"beta={default:g}") and reward_unit(name, {"beta": 7.5}).endswith("beta=7.5")
    moved, _ = numbers(name, shift=0.25)
    assert (moved != pytest.approx(reward)) == ("over the reference" in unit)


def test_a_loss_has_its_own_unit_and_an_nll_one_in_nats():
    assert loss_unit("sft") == "nats per token"
    assert loss_unit("synpo") == loss_unit("synpo", {"alpha": 20.0, "link": None}) != loss_unit("dpo")
    assert loss_unit("synpo", {"link": "logsigmoid"}) == "synpo logsigmoid loss"
    assert loss_unit("dpo", {"variant": "ipo"}, auxiliary_nll=0.5) == "dpo ipo loss + 0.5 NLL"


def test_one_line_for_people():
    assert describe_units("synpo") == "rewards are G (probability), log-probs means (nats per token)"
    assert describe_units("dpo", {"beta": 0.5}) == (
        "rewards are beta*r (beta·nats over the reference, beta=0.5), log-probs sums (nats per response)"
    )
    assert describe_units("dpo", {"reference_free": True}) == (
        "rewards are beta*r (beta·nats per response, beta=0.1), log-probs sums (nats per response)"
    )
    assert describe_units("sft") == "loss in nats per token"
    with pytest.raises(ValueError, match="unknown loss 'cringe', expected one of synpo"):
        describe_units("cringe")
