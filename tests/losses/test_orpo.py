"""ORPO by hand, and where its odds are infinite."""

import math

import pytest
import torch

from synpo_fast.losses import orpo

from . import truth

# exp(m+) = 1/2, odds 1; exp(m-) = 1/5, odds 1/4; log odds ratio ln 4; sigmoid(ln 4) = 4/5.
POLICY = truth.as_logprobs([([math.log(0.25), 0.0], [math.log(0.2)])])


def test_by_hand():
    expected = math.log(2) - 0.1 * math.log(4 / 5)
    assert orpo(POLICY).losses.item() == pytest.approx(expected, rel=1e-12)
    assert orpo(POLICY, beta=0.0, nll_reduce="sum").losses.item() == pytest.approx(math.log(4), rel=1e-12)
    assert orpo(POLICY).chosen_rewards.item() == pytest.approx(-0.1 * math.log(2))


def test_equal_odds_leave_nll_plus_beta_ln_2():
    policy = truth.as_logprobs([([-1.0, -2.0], [-1.5])])
    assert orpo(policy, beta=0.5).losses.item() == pytest.approx(1.5 + 0.5 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-80.0, -1e-9), (-90.0, -91.0)])
def test_sure_and_hopeless_answers_stay_finite(chosen, rejected, dtype):
    policy, chosen_leaf, rejected_leaf = truth.with_grad(truth.as_logprobs([([chosen], [rejected])], dtype))
    losses = orpo(policy).losses
    losses.sum().backward()
    for tensor in (losses, chosen_leaf.grad, rejected_leaf.grad):
        assert tensor.isfinite().all()


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="beta is -1"):
        orpo(POLICY, beta=-1)
    with pytest.raises(ValueError, match="reduce is 'mean', expected one of 'token_mean', 'batch_token_mean', 'sum'"):
        orpo(POLICY, nll_reduce="mean")
