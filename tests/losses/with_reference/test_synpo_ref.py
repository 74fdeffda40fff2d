"""SynPO with a reference: its gradient in closed form, its start at the reference, and the bounds of its rewards."""

import math

import pytest
import torch

from synpo_fast.losses import PairLogprobs, synpo, synpo_ref
from tests.losses import truth

LENGTHS = [(1, 1), (5, 5), (40, 2), (1, 17)]


def truth_coefficients(pair, reference, *, alpha=30.0, beta=0.2, link="sigmoid"):
    """The derivative of the loss of one pair by each token log-prob, in Python floats."""
    chosen, rejected = pair
    G_chosen, G_rejected = math.exp(truth.mean(chosen)), math.exp(truth.mean(rejected))
    shift = math.exp(truth.mean(reference[0])) - math.exp(truth.mean(reference[1]))
    x = alpha * (G_chosen - G_rejected - shift)
    slope = truth.sigmoid(-x) * (truth.sigmoid(x) if link == "sigmoid" else 1.0)
    return (
        [-(alpha * slope * G_chosen + beta * math.exp(lp)) / len(chosen) for lp in chosen],
        [alpha * slope * G_rejected / len(rejected)] * len(rejected),
    )


@pytest.mark.parametrize("link", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_gradient_equals_the_closed_form(link, dtype, rel, seed):
    pairs, reference = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=seed)
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(pairs, dtype))
    synpo_ref(policy, truth.as_logprobs(reference, dtype), link=link).losses.sum().backward()
    expected = [truth_coefficients(pair, ref, link=link) for pair, ref in zip(pairs, reference, strict=True)]
    assert chosen.grad.tolist() == pytest.approx([c for each, _ in expected for c in each], rel=rel)
    assert rejected.grad.tolist() == pytest.approx([c for _, each in expected for c in each], rel=rel)


def test_at_the_reference_every_pair_starts_in_the_middle_of_the_link():
    policy = truth.as_logprobs(truth.ragged_pairs(LENGTHS))
    output = synpo_ref(policy, policy, beta=0.0)
    assert output.losses.tolist() == [-0.5] * len(LENGTHS)
    assert output.chosen_rewards.tolist() == output.rejected_rewards.tolist() == [0.0] * len(LENGTHS)
    logarithmic = synpo_ref(policy, policy, beta=0.0, link="logsigmoid").losses
    assert logarithmic.tolist() == pytest.approx([math.log(2)] * len(LENGTHS))


def test_a_reference_with_equal_means_changes_nothing():
    policy = truth.as_logprobs(truth.ragged_pairs(LENGTHS))
    reference = truth.as_logprobs([([-1.5] * m, [-1.5] * n) for m, n in LENGTHS])
    torch.testing.assert_close(synpo_ref(policy, reference).losses, synpo(policy).losses, rtol=1e-13, atol=0)


def test_a_sum_per_response_is_a_reference_too():
    policy = truth.as_logprobs(truth.ragged_pairs(LENGTHS))
    reference = truth.ragged_pairs(LENGTHS, seed=1)
    chosen, rejected = (torch.tensor([math.fsum(pair[side]) for pair in reference]).double() for side in (0, 1))
    sums = PairLogprobs.from_sums(chosen, rejected)
    per_token = synpo_ref(policy, truth.as_logprobs(reference)).losses
    torch.testing.assert_close(synpo_ref(policy, sums).losses, per_token, rtol=1e-6, atol=0)


def test_rewards_stay_between_minus_1_and_1():
    sure, impossible = [-1e-9], [-80.0]
    policy = truth.as_logprobs([(sure, impossible)])
    output = synpo_ref(policy, truth.as_logprobs([(impossible, sure)]))
    assert output.chosen_rewards.item() == pytest.approx(1.0) and output.rejected_rewards.item() == pytest.approx(-1.0)
    assert output.losses.item() == pytest.approx(-1.2)


def test_what_is_refused():
    policy = truth.as_logprobs([([-1.0], [-1.0])])
    with pytest.raises(ValueError, match="synpo_ref needs a reference"):
        synpo_ref(policy)
    with pytest.raises(ValueError, match="require grad"):
        synpo_ref(policy, truth.with_grad(policy)[0])
    with pytest.raises(ValueError, match="link is 'tanh'"):
        synpo_ref(policy, policy, link="tanh")
    with pytest.raises(ValueError, match="offsets is"):
        synpo_ref(policy, truth.as_logprobs([([-1.0] * 3, [-1.0])]))
