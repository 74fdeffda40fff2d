"""The NLL and its three reductions, and the auxiliary term."""

import pytest
import torch

from synpo_fast.losses import AuxiliaryNLL, PairLogprobs, nll, preference_loss

from . import truth

# Chosen: 3 over 2 tokens, 5 over 1. Ground truth: 4 over 1 token, 6 over 3.
PAIRS = [([-1.0, -2.0], [-1.0]), ([-5.0], [-1.0])]
TRUTHS = [torch.tensor([-4.0]).double(), torch.tensor([-1.0, -2.0, -3.0]).double()]
POLICY = truth.as_logprobs(PAIRS, ground_truth=TRUTHS)


def test_by_hand():
    assert nll(POLICY).tolist() == [1.5, 5.0]
    assert nll(POLICY, reduce="sum").tolist() == [3.0, 5.0]
    assert nll(POLICY, reduce="batch_token_mean").tolist() == pytest.approx([3.0 * 2 / 3, 5.0 * 2 / 3])
    assert nll(POLICY, reduce="batch_token_mean").mean().item() == pytest.approx(8 / 3)
    assert nll(POLICY, target="ground_truth").tolist() == [4.0, 2.0]


@pytest.mark.parametrize("name", ["synpo", "simpo", "orpo", "cpo"])
@pytest.mark.parametrize("target", ["chosen", "ground_truth"])
@pytest.mark.parametrize("reduce", ["token_mean", "batch_token_mean", "sum"])
def test_it_adds_to_any_loss(name, target, reduce):
    plain = preference_loss(name, POLICY)
    output = preference_loss(name, POLICY, auxiliary=AuxiliaryNLL(target, 0.25, reduce))
    expected = plain.losses + 0.25 * nll(POLICY, target=target, reduce=reduce)
    assert output.losses.equal(expected)
    assert ("nll_loss/ground_truth" in output.metrics) == (target == "ground_truth")


def test_longvpo_and_gdpo():
    reference = truth.as_logprobs([([-1.5, -2.0], [-1.0]), ([-4.0], [-2.0])])
    margins = [0.5, -2.0]  # h per pair
    longvpo = preference_loss("dpo", POLICY, reference, beta=0.01, auxiliary=AuxiliaryNLL())
    expected = [-truth.log_sigmoid(0.01 * h) + n for h, n in zip(margins, [1.5, 5.0], strict=True)]
    assert longvpo.losses.tolist() == pytest.approx(expected, rel=1e-12)
    gdpo = preference_loss("dpo", POLICY, reference, auxiliary=AuxiliaryNLL("ground_truth", 0.1))
    expected = [-truth.log_sigmoid(0.1 * h) + 0.1 * n for h, n in zip(margins, [4.0, 2.0], strict=True)]
    assert gdpo.losses.tolist() == pytest.approx(expected, rel=1e-12)
    assert gdpo.metrics["nll_loss/ground_truth"].item() == pytest.approx(10 / 4)
    assert gdpo.metrics["nll_loss"].item() == pytest.approx(8 / 3)


def test_ground_truth_gets_the_gradient():
    leaf = torch.tensor([-4.0, -1.0], requires_grad=True)
    offsets = torch.tensor([0, 2])
    policy = PairLogprobs(torch.zeros(2), torch.zeros(2), offsets, offsets, leaf, offsets)
    preference_loss("synpo", policy, auxiliary=AuxiliaryNLL("ground_truth", 0.1)).losses.sum().backward()
    assert leaf.grad.tolist() == pytest.approx([-0.05, -0.05])


def test_a_missing_or_empty_target_is_refused():
    with pytest.raises(ValueError, match="the policy log-probs hold no ground_truth"):
        preference_loss("synpo", truth.as_logprobs(PAIRS), auxiliary=AuxiliaryNLL("ground_truth"))
    empty = truth.as_logprobs(PAIRS, ground_truth=[TRUTHS[0], TRUTHS[0][:0]])
    with pytest.raises(ValueError, match="ground_truth response of pair 1 is empty"):
        nll(empty, target="ground_truth")


def test_an_empty_target_is_zero_where_the_host_cannot_look(blind_host):
    empty = truth.as_logprobs(PAIRS, ground_truth=[TRUTHS[0], TRUTHS[0][:0]])
    for reduce in ("token_mean", "batch_token_mean", "sum"):
        assert nll(empty, target="ground_truth", reduce=reduce)[1].item() == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "rejected"}, "target is 'rejected', expected one of 'chosen', 'ground_truth'"),
        ({"weight": -0.1}, "weight is -0.1"),
        ({"reduce": "mean"}, "reduce is 'mean'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryNLL(**options)
