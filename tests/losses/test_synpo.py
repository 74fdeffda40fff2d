"""SynPO: by hand, its gradient against the closed form, the extremes, and 16-bit arithmetic."""

import math

import pytest
import torch

from synpo_fast.losses import PairLogprobs, synpo, synpo_token_coefficients

from . import truth


def one_pair(chosen, rejected, dtype=torch.float32) -> PairLogprobs:
    return truth.as_logprobs([(chosen, rejected)], dtype)


def truth_coefficients(chosen, rejected, *, alpha=30.0, beta=0.2, link="sigmoid"):
    """The closed form in Python floats, for one pair."""
    G_chosen, G_rejected = math.exp(truth.mean(chosen)), math.exp(truth.mean(rejected))
    x = alpha * (G_chosen - G_rejected)
    slope = truth.sigmoid(-x) * (truth.sigmoid(x) if link == "sigmoid" else 1.0)
    return (
        [-(alpha * slope * G_chosen + beta * math.exp(lp)) / len(chosen) for lp in chosen],
        [alpha * slope * G_rejected / len(rejected)] * len(rejected),
    )


def test_by_hand():
    # G+ = sqrt(0.5 * 0.125) = 0.25, A+ = (0.5 + 0.125) / 2 = 0.3125, G- = 0.2, x = 30 * 0.05 = 1.5.
    policy = one_pair([math.log(0.5), math.log(0.125)], [math.log(0.2)], torch.float64)
    s = 1 / (1 + math.exp(-1.5))
    output = synpo(policy)
    assert output.losses.item() == pytest.approx(-s - 0.2 * 0.3125, rel=1e-12)
    assert output.losses.item() == pytest.approx(-0.8800744761936437, rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(0.25)
    assert output.rejected_rewards.item() == pytest.approx(0.2)
    assert output.chosen_logps.item() == pytest.approx(math.log(0.25))
    assert synpo(policy, link="logsigmoid").losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)) - 0.0625)

    chosen, rejected = synpo_token_coefficients(policy)
    contrast = 30 * s * (1 - s)
    assert chosen.tolist() == pytest.approx([-(contrast * 0.25 + 0.2 * p) / 2 for p in (0.5, 0.125)], rel=1e-12)
    assert rejected.tolist() == pytest.approx([contrast * 0.2], rel=1e-12)


@pytest.mark.parametrize("link", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_autograd_closed_form_and_python_agree(link, dtype, rel):
    # One-token answers, equal lengths, and a long one beside a short one.
    pairs = truth.ragged_pairs([(1, 1), (5, 5), (40, 2), (1, 17)])
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(pairs, dtype))
    synpo(policy, link=link).losses.mean().backward()
    closed_chosen, closed_rejected = synpo_token_coefficients(policy, link=link)
    expected = [truth_coefficients(*pair, link=link) for pair in pairs]
    expected_chosen = [c / len(pairs) for chosen_c, _ in expected for c in chosen_c]
    expected_rejected = [c / len(pairs) for _, rejected_c in expected for c in rejected_c]
    for got in (chosen.grad, closed_chosen):
        assert got.tolist() == pytest.approx(expected_chosen, rel=rel)
    for got in (rejected.grad, closed_rejected):
        assert got.tolist() == pytest.approx(expected_rejected, rel=rel)


def test_num_pairs_divides_the_coefficients():
    policy = truth.as_logprobs(truth.ragged_pairs([(3, 4), (2, 2)]))
    own, _ = synpo_token_coefficients(policy, num_pairs=1)
    assert synpo_token_coefficients(policy)[0].equal(own / 2)
    torch.testing.assert_close(synpo_token_coefficients(policy, num_pairs=64)[0], own / 64, rtol=1e-15, atol=0)
    with pytest.raises(ValueError, match="num_pairs is 0"):
        synpo_token_coefficients(policy, num_pairs=0)


EXTREMES = {
    "one sure token each": ([0.0], [0.0]),
    "one token, sure against impossible": ([0.0], [-60.0]),
    "one token, impossible against sure": ([-60.0], [0.0]),
    "4k tokens": ([-1.5] * 4096, [-2.8] * 4096),
    "4k tokens against one": ([-0.9 - 1e-4 * i for i in range(4096)], [-1.0]),
    "mean log-prob -50": ([-50.0] * 7, [-50.0] * 9),
    "mean -50 from one bad token": ([0.0] * 3 + [-200.0], [-50.0]),
    "G+ equals G-": ([-1.0, -2.0], [-2.0, -1.0]),
    "saturated, x = 30": ([-1e-6], [-40.0]),
    "saturated, x = -30": ([-40.0], [-1e-6]),
}


@pytest.mark.parametrize("link", ["sigmoid", "logsigmoid"])
@pytest.mark.parametrize("case", EXTREMES)
def test_extremes_in_fp32(case, link):
    chosen, rejected = EXTREMES[case]
    policy, chosen_leaf, rejected_leaf = truth.with_grad(one_pair(chosen, rejected))
    output = synpo(policy, link=link)
    output.losses.sum().backward()
    # Rounding G+ - G- to fp32 moves x by up to 30 * 2^-24, hence the gradient by some 2e-6 of itself. The exponent adds
    # 50 * 2^-24 at a mean log-prob of -50.
    assert output.losses.item() == pytest.approx(truth.synpo(chosen, rejected, link=link), rel=1e-6)
    expected_chosen, expected_rejected = truth_coefficients(chosen, rejected, link=link)
    closed_chosen, closed_rejected = synpo_token_coefficients(policy, link=link)
    for got in (chosen_leaf.grad, closed_chosen):
        assert got.tolist() == pytest.approx(expected_chosen, rel=1e-5, abs=1e-37)
    for got in (rejected_leaf.grad, closed_rejected):
        assert got.tolist() == pytest.approx(expected_rejected, rel=1e-5, abs=1e-37)


def test_the_saturated_gradient_is_not_rounded_away():
    # At x = 30, sigmoid is 1 in fp32; 1 - s is e^-30.
    policy, chosen, _ = truth.with_grad(one_pair([0.0], [-100.0]))
    synpo(policy, beta=0.0).losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-30 * math.exp(-30), rel=1e-5)


def test_equal_geometric_means_take_the_steepest_slope():
    policy, chosen, rejected = truth.with_grad(one_pair([-1.0], [-1.0]))
    synpo(policy, beta=0.0).losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-30 / 4 * math.exp(-1), rel=1e-6)
    assert rejected.grad.item() == pytest.approx(30 / 4 * math.exp(-1), rel=1e-6)


def test_chosen_outweighs_rejected_by_at_least_the_ratio_of_their_means():
    chosen, rejected = synpo_token_coefficients(one_pair([-1.0] * 6, [-2.0] * 6))
    assert (chosen.abs() >= rejected * math.exp(1.0) * (1 - 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_fp32(dtype):
    low = truth.as_logprobs(truth.ragged_pairs([(3, 8), (200, 150)]), torch.float32)
    chosen, rejected = low.chosen.to(dtype), low.rejected.to(dtype)
    low = PairLogprobs(chosen, rejected, low.chosen_offsets, low.rejected_offsets)
    high = PairLogprobs(chosen.float(), rejected.float(), low.chosen_offsets, low.rejected_offsets)
    assert synpo(low).losses.dtype == torch.float32
    assert synpo(low).losses.equal(synpo(high).losses)
    for got, expected in zip(synpo_token_coefficients(low), synpo_token_coefficients(high), strict=True):
        assert got.dtype == torch.float32
        assert got.equal(expected)


def test_autocast_changes_nothing():
    policy = truth.as_logprobs(truth.ragged_pairs([(30, 20)]), torch.float32)
    expected = synpo(policy).losses
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert synpo(policy).losses.equal(expected)


def test_fp16_arithmetic_loses_late_coefficients_that_ours_keep():
    # Mean log-probs late in training, -1.02 and -2.82, answers of 400 tokens, 32 accumulation steps:
    # G+ = 0.3606, G- = 0.0596, x = 9.03, s(1 - s) = 1.2e-4, so c = 30 * 1.2e-4 * 0.0596 / 400 / 32 = 1.7e-8.
    # The smallest fp16 number is 2^-24 = 6.0e-8 and half of it rounds to 0.
    T, accumulation = 400, 32
    policy = one_pair([-1.02] * T, [-2.82] * T)
    _, rejected = synpo_token_coefficients(policy, num_pairs=accumulation)
    assert rejected[0].item() == pytest.approx(1.67e-8, rel=0.01)
    assert rejected[0].item() < torch.finfo(torch.float16).smallest_normal * 2**-11

    # The released code: a head under fp16 autocast without loss scaling. log-softmax and loss are fp32, but autograd
    # hands the gradient of the logits back in fp16.
    logits = torch.tensor([0.0, 2.76], dtype=torch.float16).repeat(T, 1).requires_grad_()  # log-prob of class 0: -2.82
    released = logits.float().log_softmax(-1)[:, 0]
    assert released[0].item() == pytest.approx(-2.82, abs=0.01)
    x = 30 * (math.exp(-1.02) - released.mean().exp())
    (-torch.sigmoid(x) / accumulation).backward()
    assert logits.grad.dtype == torch.float16
    assert (logits.grad == 0).all()

    # The same head with our coefficients: c * (onehot - softmax), in fp32.
    softmax = logits.detach().float().softmax(-1)
    ours = rejected[:, None] * (torch.tensor([1.0, 0.0]) - softmax)
    assert (ours != 0).all()

    # With the loss itself in fp16, s rounds to 1 from x = 8.4 on, and 1 - s to 0.
    x = torch.tensor(9.03, dtype=torch.float16, requires_grad=True)
    torch.sigmoid(x).backward()
    assert x.grad.item() == 0.0
    x = torch.tensor(9.03, requires_grad=True)
    torch.sigmoid(x).backward()
    assert x.grad.item() == pytest.approx(1.2e-4, rel=0.01)


def test_published_late_state_is_subnormal_in_fp16():
    # Step 1735 of the authors' run, -1.51 and -2.82, answers of 300 tokens, 32 accumulation steps: every coefficient of
    # the rejected answer lies below fp16's smallest normal number, where 10 bits of precision shrink to 4.
    _, rejected = synpo_token_coefficients(one_pair([-1.51] * 300, [-2.82] * 300), num_pairs=32)
    assert rejected[0].item() == pytest.approx(1.45e-6, rel=0.01)
    assert rejected[0].item() < torch.finfo(torch.float16).smallest_normal
    assert abs(rejected[0].half().item() / rejected[0].item() - 1) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0, expected more than 0"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"beta": -0.1}, "beta is -0.1, expected at least 0"),
        ({"beta": "0.2"}, "beta is '0.2', expected a finite number"),
        ({"link": "tanh"}, "link is 'tanh', expected one of 'sigmoid', 'logsigmoid'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        synpo(one_pair([-1.0], [-1.0]), **options)
