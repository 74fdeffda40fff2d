"""DPO, hinge and IPO: by hand, at their special points, and what the reference must be."""

import math

import pytest
import torch

from synpo_fast.losses import PairLogprobs, dpo

from . import truth

# r(y+) = (-1 - 2) - (-1.5 - 2.5) = 1, r(y-) = -4 - (-2) = -2, h = 3.
PAIRS = [([-1.0, -2.0], [-4.0])]
REFERENCE = [([-1.5, -2.5], [-2.0])]
H = 3.0


def by_hand(**options) -> float:
    return dpo(truth.as_logprobs(PAIRS), truth.as_logprobs(REFERENCE), **options).losses.item()


def test_by_hand():
    assert by_hand() == pytest.approx(math.log(1 + math.exp(-0.1 * H)), rel=1e-12)
    assert by_hand(beta=0.5, variant="hinge") == 0.0
    assert by_hand(beta=0.2, variant="hinge") == pytest.approx(1 - 0.2 * H)
    assert by_hand(beta=0.25, variant="ipo") == pytest.approx((1 / 2 + 2 / 1 - 2) ** 2)
    smoothed = 0.8 * math.log(1 + math.exp(-0.1 * H)) + 0.2 * math.log(1 + math.exp(0.1 * H))
    assert by_hand(label_smoothing=0.2) == pytest.approx(smoothed, rel=1e-12)


def test_rewards_and_logps():
    output = dpo(truth.as_logprobs(PAIRS), truth.as_logprobs(REFERENCE))
    assert output.chosen_rewards.item() == pytest.approx(0.1)
    assert output.rejected_rewards.item() == pytest.approx(-0.2)
    assert output.chosen_logps.item() == -3.0
    assert output.rejected_logps.item() == -4.0


def test_reference_free_reads_the_policy_alone():
    output = dpo(truth.as_logprobs(PAIRS), reference_free=True)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-0.1 * (-3 + 4))), rel=1e-12)


def test_policy_equal_to_reference():
    policy = truth.as_logprobs(truth.ragged_pairs([(3, 5), (1, 40)]))
    assert dpo(policy, policy).losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert dpo(policy, policy, label_smoothing=0.3).losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert dpo(policy, policy, variant="hinge").losses.tolist() == [1.0, 1.0]
    assert dpo(policy, policy, variant="ipo", beta=0.1).losses.tolist() == pytest.approx([25.0] * 2)  # (1 / 0.2)^2


def test_hinge_is_flat_from_its_margin_on():
    for chosen, expected_loss, expected_grad in [(9.5, 0.05, -0.1), (10.0, 0.0, 0.0), (12.0, 0.0, 0.0)]:
        policy, leaf, _ = truth.with_grad(truth.as_logprobs([([chosen - 20.0], [-20.0])]))
        losses = dpo(policy, reference_free=True, variant="hinge").losses  # h = chosen, margin at 1 / beta = 10
        losses.sum().backward()
        assert losses.item() == pytest.approx(expected_loss)
        assert leaf.grad.item() == pytest.approx(expected_grad)


def test_ipo_gradient_vanishes_at_its_target():
    # The averaged log-ratios differ by 1 / (2 * beta) = 1.
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs([([-1.0, -1.0], [-2.0, -2.0, -2.0])]))
    losses = dpo(policy, reference_free=True, variant="ipo", beta=0.5).losses
    losses.sum().backward()
    assert losses.item() == 0.0
    assert chosen.grad.tolist() == [0.0, 0.0]
    assert rejected.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("variant", ["sigmoid", "hinge", "ipo"])
def test_reference_sums_do_as_well_as_tokens(variant):
    pairs, reference = truth.ragged_pairs([(3, 5), (2, 1)]), truth.ragged_pairs([(3, 5), (2, 1)], seed=1)
    sums = PairLogprobs.from_sums(
        torch.tensor([math.fsum(chosen) for chosen, _ in reference], dtype=torch.float64),
        torch.tensor([math.fsum(rejected) for _, rejected in reference], dtype=torch.float64),
    )
    policy = truth.as_logprobs(pairs)
    expected = dpo(policy, truth.as_logprobs(reference), variant=variant).losses
    torch.testing.assert_close(dpo(policy, sums, variant=variant).losses, expected, rtol=1e-12, atol=0)


def test_a_reference_that_does_not_fit_is_refused():
    policy = truth.as_logprobs(PAIRS)
    with pytest.raises(ValueError, match="dpo needs a reference, or reference_free=True"):
        dpo(policy)
    with pytest.raises(ValueError, match="reference_free is True, but a reference was given"):
        dpo(policy, policy, reference_free=True)
    with pytest.raises(ValueError, match="reference has 2 pairs on cpu, policy 1"):
        dpo(policy, truth.as_logprobs(PAIRS * 2))
    with pytest.raises(ValueError, match=r"reference chosen_offsets is \[0, 3\], expected \[0, 2\]"):
        dpo(policy, truth.as_logprobs([([-1.0] * 3, [-4.0])]))
    with pytest.raises(ValueError, match="require grad"):
        dpo(policy, truth.with_grad(truth.as_logprobs(REFERENCE))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": math.nan}, "beta is nan"),
        ({"variant": "kto"}, "variant is 'kto', expected one of 'sigmoid', 'hinge', 'ipo'"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5, expected less than 0.5"),
        ({"label_smoothing": 0.1, "variant": "ipo"}, "variant 'ipo' has no smoothed form"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        by_hand(**options)
