"""SimPO by hand and at its margin."""

import math

import pytest

from synpo_fast.losses import simpo

from . import truth

# m(y+) = -1.5, m(y-) = -2.5, so beta * (m+ - m-) = 2 at beta 2.
POLICY = truth.as_logprobs([([-1.0, -2.0], [-2.0, -2.0, -3.5])])


def test_by_hand():
    assert simpo(POLICY).losses.item() == pytest.approx(math.log(1 + math.exp(-(2.0 - 0.5))), rel=1e-12)
    smoothed = 0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5))
    assert simpo(POLICY, label_smoothing=0.1).losses.item() == pytest.approx(smoothed, rel=1e-12)


def test_rewards_and_logps():
    output = simpo(POLICY)
    assert output.chosen_rewards.item() == pytest.approx(-3.0)
    assert output.rejected_rewards.item() == pytest.approx(-5.0)
    assert output.chosen_logps.item() == pytest.approx(-1.5)
    assert output.metrics["rewards/margins"].item() == pytest.approx(2.0)


def test_at_the_margin_the_loss_is_ln_2():
    assert simpo(POLICY, gamma=2.0).losses.item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("options", [{"beta": -1.0}, {"gamma": math.inf}, {"label_smoothing": -0.1}])
def test_bad_options_are_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is "):
        simpo(POLICY, **options)
