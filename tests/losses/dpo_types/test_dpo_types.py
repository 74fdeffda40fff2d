"""DPO's loss types: Liger's own code on the same tensors, large log-ratios, sorted batches, and what is refused."""

import math

import pytest
import torch

from synpo_fast.losses import LOSSES, PairLogprobs, preference_loss

from .. import truth

LENGTHS = [(3, 5), (1, 1), (6, 2), (4, 4)]
PAIRS, REFERENCE = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=1)
TYPES = [name for name, spec in LOSSES.items() if spec.reward == "beta*r" and "ld_alpha" in spec.options]
DIVERGENCES = ("forward_kl", "js_divergence", "alpha_divergence")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dpo", {}),
        ("hinge", {}),
        ("exo_pair", {"label_smoothing": 0.125}),
        ("nca_pair", {}),
        ("robust", {"label_smoothing": 0.125}),
        ("bco_pair", {}),
        ("sppo_hard", {}),
        ("apo_zero", {}),
        ("apo_down", {}),
        ("discopop", {"discopop_tau": 0.25}),
    ],
)
@pytest.mark.parametrize("reference_free", [False, True])
def test_liger(name, options, reference_free):
    chunked_loss = pytest.importorskip(
        "liger_kernel.chunked_loss.dpo_loss", reason="Liger is the oracle and is not installed"
    )
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(PAIRS))
    reference = None if reference_free else truth.as_logprobs(REFERENCE)
    free = {"reference_free": True} if reference_free else {}
    output = preference_loss(name, policy, reference, beta=0.5, **options, **free)
    output.losses.mean().backward()

    logps = torch.stack([output.chosen_logps, output.rejected_logps]).requires_grad_()
    refs = (
        [None, None]
        if reference_free
        else [torch.tensor([sum(pair[i]) for pair in REFERENCE]).double() for i in (0, 1)]
    )
    loss, *rewards = chunked_loss.LigerFusedLinearDPOFunction.preference_loss_fn(
        *logps, torch.zeros(2 * len(PAIRS), 1), *refs, beta=0.5, loss_type={"dpo": "sigmoid"}.get(name, name), **options
    )
    loss.backward()
    bar = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(output.losses.mean(), loss.detach(), **bar)
    torch.testing.assert_close(
        torch.stack([output.chosen_rewards, output.rejected_rewards]), torch.stack(rewards).detach(), **bar
    )
    per_token = [logps.grad[i].repeat_interleave(torch.tensor(LENGTHS)[:, i]) for i in (0, 1)]
    torch.testing.assert_close(chosen.grad, per_token[0], **bar)
    torch.testing.assert_close(rejected.grad, per_token[1], **bar)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_log_ratios_have_a_finite_loss_and_gradient(name, scale):
    # Sums of 2,000 tokens reach thousands of nats; TRL's discopop and forward_kl are nan here.
    values = [([-scale], [-2.0]), ([-2.0], [-scale]), ([-scale], [-scale / 2]), ([-1.0], [-1.0])]
    for divergence in ("reverse_kl", *DIVERGENCES) if "f_divergence" in LOSSES[name].options else (None,):
        options = {} if divergence is None else {"f_divergence": divergence}
        for beta in (0.05, 1.0):
            policy, chosen, rejected = truth.with_grad(truth.as_logprobs(values, torch.float32))
            reference = truth.as_logprobs([([-3.0], [-4.0])] * len(values), torch.float32)
            losses = preference_loss(name, policy, reference, beta=beta, **options).losses
            losses.sum().backward()
            assert losses.isfinite().all(), (divergence, beta)
            assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all(), (divergence, beta)


def test_discopop_for_a_pair_far_on_the_wrong_side_is_the_logistic_loss():
    policy = truth.as_logprobs([([-500.0], [-1.0])], torch.float32)
    loss = preference_loss("discopop", policy, beta=1.0, reference_free=True).losses
    assert loss.item() == pytest.approx(499.0)


def test_a_divergence_is_cut_where_its_exponential_would_overflow():
    policy, chosen, _ = truth.with_grad(truth.as_logprobs([([-100.0], [0.0])], torch.float32))
    loss = preference_loss("ipo", policy, reference_free=True, f_divergence="forward_kl", beta=0.5).losses
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(80), rel=1e-5)
    assert chosen.grad.item() == 0.0


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorting_does_not_see_pairs_that_are_not_compared(name):
    def losses(pairs, reference, mask):
        output = preference_loss(
            name, truth.as_logprobs(pairs, preference=mask), truth.as_logprobs(reference), beta=0.5
        )
        return output.losses.tolist()

    expected = losses(PAIRS, REFERENCE, None)
    more, mask = [PAIRS[0], ([-30.0], [-0.1]), *PAIRS[1:], ([-0.1], [-30.0])], [True, False, True, True, True, False]
    more_reference = [REFERENCE[0], ([-0.1], [-9.0]), *REFERENCE[1:], ([-0.1], [-9.0])]
    found = losses(more, more_reference, mask)
    assert [found[i] for i in (0, 2, 3, 4)] == pytest.approx(expected, rel=1e-12)
    # The loss of a pair is that of its own rank, wherever it stands in the batch.
    swapped = losses(PAIRS[::-1], REFERENCE[::-1], None)
    assert swapped == pytest.approx(expected[::-1], rel=1e-12)


@pytest.mark.parametrize("name", TYPES)
def test_one_pair_sorted_is_dpo_and_ld_alpha_needs_tokens(name):
    policy, reference = truth.as_logprobs(PAIRS[:1]), truth.as_logprobs(REFERENCE[:1])
    if LOSSES[name].sorts_batch:
        expected = preference_loss("dpo", policy, reference, label_smoothing=0.1).losses
        torch.testing.assert_close(preference_loss(name, policy, reference, label_smoothing=0.1).losses, expected)
    sums = PairLogprobs.from_sums(torch.tensor([-4.0]).double(), torch.tensor([-5.0]).double())
    preference_loss(name, policy, sums)
    with pytest.raises(ValueError, match=r"ld_alpha is 0\.5, which needs .* got \(1, 1\) values for \(3, 5\) tokens"):
        preference_loss(name, policy, sums, ld_alpha=0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing is 0.0, expected more than 0"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing is 0.5, expected less than 0.5"),
        ("aot", {"label_smoothing": 0.5}, "label_smoothing is 0.5, expected less than 0.5"),
        ("discopop", {"discopop_tau": 0.0}, "discopop_tau is 0.0, expected more than 0"),
        ("hinge", {"ld_alpha": 1.5}, "ld_alpha is 1.5, expected at most 1"),
        ("ipo", {"f_divergence": "kl"}, "f_divergence is 'kl', expected one of 'reverse_kl', 'forward_kl'"),
        ("dpo", {"f_alpha_divergence_coef": 0.3}, "f_divergence 'reverse_kl' has no coefficient"),
        ("bco_pair", {"f_divergence": "forward_kl"}, "loss 'bco_pair' has no option f_divergence"),
        ("aot", {"reference_free": True}, "loss 'aot' has no option reference_free"),
    ],
)
def test_what_a_type_does_not_have_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(name, truth.as_logprobs(PAIRS), truth.as_logprobs(REFERENCE), **options)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="apo_zero needs a reference, or reference_free=True"):
        preference_loss("apo_zero", truth.as_logprobs(PAIRS))
    with pytest.raises(ValueError, match=r"aot needs a reference$"):
        preference_loss("aot", truth.as_logprobs(PAIRS))
