"""CPO by hand."""

import math

import pytest

from synpo_fast.losses import cpo

from . import truth

# S+ = -3, S- = -5, h = 2.
POLICY = truth.as_logprobs([([-1.0, -2.0], [-5.0])])


def test_by_hand():
    contrast = math.log(1 + math.exp(-0.2))
    assert cpo(POLICY).losses.item() == pytest.approx(contrast + 1.5, rel=1e-12)
    assert cpo(POLICY, nll_weight=0.0).losses.item() == pytest.approx(contrast, rel=1e-12)
    assert cpo(POLICY, nll_reduce="sum").losses.item() == pytest.approx(contrast + 3.0, rel=1e-12)
    assert cpo(POLICY, variant="hinge", nll_weight=0.0).losses.item() == pytest.approx(0.8)
    smoothed = 0.75 * contrast + 0.25 * math.log(1 + math.exp(0.2))
    assert cpo(POLICY, label_smoothing=0.25, nll_weight=0.0).losses.item() == pytest.approx(smoothed, rel=1e-12)


def test_rewards_and_logps():
    output = cpo(POLICY)
    assert output.chosen_rewards.item() == pytest.approx(-0.3)
    assert output.rejected_rewards.item() == pytest.approx(-0.5)
    assert output.chosen_logps.item() == -3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0}, "beta is 0"),
        ({"nll_weight": -1.0}, "nll_weight is -1.0"),
        ({"variant": "ipo"}, "variant is 'ipo', expected one of 'sigmoid', 'hinge'"),
        ({"variant": "hinge", "label_smoothing": 0.1}, "variant 'hinge' has no smoothed form"),
        ({"nll_reduce": "none"}, "reduce is 'none'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        cpo(POLICY, **options)
