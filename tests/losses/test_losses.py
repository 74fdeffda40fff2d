"""Tests that hold for every loss: the Python truth, gradients, masks, metrics, no host sync, and checks of preference_loss."""

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synpo_fast.losses import LOSSES, PairLogprobs, nll, preference_loss, synpo_token_coefficients

from . import truth

ALL_CASES = pytest.mark.parametrize(("name", "options"), truth.CASES, ids=truth.CASE_IDS)
OWN_REWARDS = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")  # they move each response by itself
LENGTHS = [(1, 1), (3, 2), (2, 7), (6, 6)]


def needs_reference(name, options) -> bool:
    return LOSSES[name].needs_reference and not options.get("reference_free", False)


def run(name, options, policy, reference=None):
    return preference_loss(name, policy, reference if needs_reference(name, options) else None, **options)


def test_every_loss_has_a_formula_to_be_checked_against():
    assert {name for name, _ in truth.CASES} == set(LOSSES)


@ALL_CASES
@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_ragged_batch_equals_the_python_truth(name, options, lengths, seed):
    pairs, reference = truth.ragged_pairs(lengths, seed=seed), truth.ragged_pairs(lengths, seed=seed + 1000)
    output = run(name, options, truth.as_logprobs(pairs), truth.as_logprobs(reference))
    assert output.losses.tolist() == pytest.approx(truth.losses(name, pairs, reference, options), rel=1e-11, abs=1e-12)
    output = run(name, options, truth.as_logprobs(pairs, torch.float32), truth.as_logprobs(reference, torch.float32))
    assert output.losses.dtype == torch.float32
    assert output.losses.tolist() == pytest.approx(truth.losses(name, pairs, reference, options), rel=2e-5, abs=2e-6)


@ALL_CASES
def test_gradcheck(name, options):
    base = truth.as_logprobs(truth.ragged_pairs(LENGTHS), preference=[True, True, False, True])
    reference = truth.as_logprobs(truth.ragged_pairs(LENGTHS, seed=1))

    def losses(chosen, rejected):
        return run(name, options, replace(base, chosen=chosen, rejected=rejected), reference).losses

    _, chosen, rejected = truth.with_grad(base)
    assert torch.autograd.gradcheck(losses, (chosen, rejected))


@pytest.mark.parametrize(("name", "options"), [case for case in truth.CASES if case[0] not in OWN_REWARDS], ids=str)
def test_identical_responses_have_no_preference_gradient(name, options):
    # The same leaf is chosen and rejected: the two halves of the contrast must cancel to the last bit.
    offsets = torch.tensor([0, 2, 5])
    logps = torch.tensor([-0.5, -1.5, -0.1, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    policy = PairLogprobs(logps, logps, offsets, offsets, kl=torch.tensor(truth.KL))
    reference = PairLogprobs(logps.detach() - 0.3, logps.detach() - 0.3, offsets, offsets)
    if "desirable_weight" in options:
        pytest.skip("the two responses have different weights")
    options = dict(options)
    if name in ("synpo", "synpo_ref"):
        options["beta"] = 0.0
    losses = run(name, options, policy, reference).losses
    if LOSSES[name].has_nll:
        losses = losses - options.get("nll_weight", 1.0) * nll(
            policy, reduce=options.get("nll_reduce", "batch_token_mean")
        )
    losses.sum().backward()
    assert logps.grad.abs().max().item() <= 1e-16


@ALL_CASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_log_probs_are_upcast_first(name, options, dtype):
    def rounded(pairs, to):
        return truth.as_logprobs([[torch.tensor(y).to(dtype).to(to).tolist() for y in pair] for pair in pairs], to)

    pairs, reference = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=1)
    low = rounded(pairs, torch.float32)
    sixteen = replace(low, chosen=low.chosen.to(dtype), rejected=low.rejected.to(dtype))
    losses = run(name, options, sixteen, rounded(reference, torch.float32)).losses
    assert losses.dtype == torch.float32
    assert losses.equal(run(name, options, low, rounded(reference, torch.float32)).losses)


@ALL_CASES
def test_metrics_by_hand(name, options):
    pairs = truth.ragged_pairs(LENGTHS)
    policy, reference = truth.as_logprobs(pairs), truth.as_logprobs(truth.ragged_pairs(LENGTHS, seed=1))
    output = run(name, options, policy, reference)
    ld_alpha = options.get("ld_alpha", 1.0)
    chosen, rejected = output.chosen_rewards.tolist(), output.rejected_rewards.tolist()

    def reduced(pair, index):
        return truth.mean(pair[index]) if LOSSES[name].reads == "mean" else truth.ld_sum(pair, index, ld_alpha)

    tokens = [lp for y, _ in pairs for lp in y]
    right = [float(a > b) for a, b in zip(chosen, rejected, strict=True)]
    counts = {}
    if LOSSES[name].unpaired:  # accuracy: the side of the reference point
        point = options.get("beta", 0.1) * truth.KL if LOSSES[name].needs_kl else 0.0
        right = [float(reward > point) for reward in chosen] + [float(reward < point) for reward in rejected]
        kl = truth.KL if LOSSES[name].needs_kl else 0.0
        counts = {"desirable_responses": 4.0, "undesirable_responses": 4.0, "kl": kl}
    assert {key: value.item() for key, value in output.metrics.items()} == pytest.approx(
        {
            "rewards/chosen": truth.mean(chosen),
            "rewards/rejected": truth.mean(rejected),
            "rewards/accuracies": truth.mean(right),
            "rewards/margins": truth.mean(chosen) - truth.mean(rejected),
            "logps/chosen": truth.mean([reduced(pair, 0) for pair in pairs]),
            "logps/rejected": truth.mean([reduced(pair, 1) for pair in pairs]),
            "nll_loss": -truth.mean(tokens),
            "preference_pairs": 4.0,
            "empty_pairs": 0.0,
            **counts,
        },
        rel=1e-9,
        abs=1e-12,
    )


@ALL_CASES
def test_only_the_losses_carry_gradients(name, options):
    policy, _, _ = truth.with_grad(truth.as_logprobs(truth.ragged_pairs(LENGTHS)))
    output = run(name, options, policy, truth.as_logprobs(truth.ragged_pairs(LENGTHS, seed=1)))
    assert output.losses.requires_grad and output.losses.shape == (4,)
    per_pair = [output.chosen_rewards, output.rejected_rewards, output.chosen_logps, output.rejected_logps]
    assert all(tensor.shape == (4,) and not tensor.requires_grad for tensor in per_pair)
    assert all(value.shape == () and not value.requires_grad for value in output.metrics.values())


@ALL_CASES
@pytest.mark.parametrize("num_rejected", [5, 0])  # an sft row may have a rejected response, and needs none
def test_sft_rows_have_their_nll_alone(name, options, num_rejected):
    lengths, mask = [(3, 2), (4, num_rejected), (2, 2)], [True, False, True]
    pairs, reference = truth.ragged_pairs(lengths), truth.ragged_pairs(lengths, seed=1)
    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(pairs, preference=mask))
    output = run(name, options, policy, truth.as_logprobs(reference, preference=mask))

    weight, reduce = options.get("nll_weight", 1.0), "token_mean"
    if LOSSES[name].has_nll:
        reduce = options.get("nll_reduce", "batch_token_mean")
    assert output.losses[1].item() == pytest.approx(weight * truth.nll([y for y, _ in pairs], reduce)[1], rel=1e-12)
    rest = [pair for pair, compared in zip(pairs, mask, strict=True) if compared]
    rest_reference = [pair for pair, compared in zip(reference, mask, strict=True) if compared]
    if reduce != "batch_token_mean":  # which depends on the other rows' tokens
        expected = truth.losses(name, rest, rest_reference, options)
        assert output.losses[[0, 2]].tolist() == pytest.approx(expected, rel=1e-11)
    output.losses[1].backward()
    assert chosen.grad.unique().numel() == 2  # one slope on the row's own tokens, 0 elsewhere
    assert (chosen.grad[3:7] < 0).all()
    assert (rejected.grad == 0).all()
    assert output.chosen_rewards[1].item() == output.rejected_rewards[1].item() == 0.0
    assert output.metrics["preference_pairs"].item() == 2
    assert output.metrics["empty_pairs"].item() == 0
    assert output.metrics["rewards/chosen"].item() == pytest.approx(output.chosen_rewards[[0, 2]].mean().item())


@ALL_CASES
def test_a_batch_of_sft_rows_alone(name, options):
    policy = truth.as_logprobs([([-1.0, -2.0], []), ([-3.0], [])], preference=[False, False])
    output = run(name, options, policy, policy)
    assert output.losses.isfinite().all()
    assert output.metrics["rewards/margins"].item() == 0.0
    assert output.metrics["preference_pairs"].item() == 0


@ALL_CASES
@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
def test_empty_pairs_contribute_nothing_where_the_host_cannot_look(blind_host, name, options, empty):
    pairs = truth.ragged_pairs([(3, 2), (4, 5), (2, 2)])
    reference = truth.ragged_pairs([(3, 2), (4, 5), (2, 2)], seed=1)

    def emptied(couples):
        y_chosen, y_rejected = couples[1]
        middle = ([] if empty != "rejected" else y_chosen, [] if empty != "chosen" else y_rejected)
        return [couples[0], middle, couples[2]]

    policy, chosen, rejected = truth.with_grad(truth.as_logprobs(emptied(pairs)))
    output = run(name, options, policy, truth.as_logprobs(emptied(reference)))
    output.losses.sum().backward()
    assert chosen.grad.isfinite().all() and rejected.grad.isfinite().all()
    assert output.metrics["empty_pairs"].item() == 1
    assert output.metrics["preference_pairs"].item() == 2
    own_nll = 0.0
    if LOSSES[name].has_nll:
        targets = nll(policy, reduce=options.get("nll_reduce", "batch_token_mean"))
        own_nll = options.get("nll_weight", 1.0) * targets[1].item()
    assert output.losses[1].item() == pytest.approx(own_nll, abs=1e-15)


@ALL_CASES
def test_no_value_is_read_and_no_shape_depends_on_one(name, options):
    # Meta tensors have no values: .item(), bool(), nonzero() and the like raise on them.
    chosen = torch.zeros(20, device="meta", requires_grad=True)
    rejected = torch.zeros(30, device="meta", requires_grad=True)
    offsets, mask = torch.zeros(5, dtype=torch.int64, device="meta"), torch.ones(4, dtype=torch.bool, device="meta")
    policy = PairLogprobs(chosen, rejected, offsets, offsets, preference=mask, kl=torch.zeros((), device="meta"))
    reference = PairLogprobs(chosen.detach(), rejected.detach(), offsets, offsets)
    run(name, options, policy, reference).losses.mean().backward()
    assert chosen.grad.shape == (20,) and rejected.grad.shape == (30,)
    synpo_token_coefficients(policy)
    padded = torch.zeros(8, 5, device="meta")
    PairLogprobs.from_padded(padded, padded == 0)


def test_specs_agree_with_the_functions():
    assert isinstance(LOSSES, dict)
    for name, spec in LOSSES.items():
        assert spec.function.__name__ == name
        parameters = inspect.signature(spec.function).parameters.values()
        keyword_only = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        assert keyword_only == spec.options
        assert ("reference" in [p.name for p in parameters]) == spec.needs_reference
        assert ("nll_reduce" in spec.options) == spec.has_nll


def test_the_entry_names_what_is_wrong():
    policy = truth.as_logprobs([([-1.0], [-2.0])])
    with pytest.raises(ValueError, match="unknown loss 'ppo', expected one of synpo, dpo, simpo, orpo, cpo"):
        preference_loss("ppo", policy)
    with pytest.raises(ValueError, match="loss 'simpo' has no option alpha, link; it has beta, gamma, label_smoothing"):
        preference_loss("simpo", policy, alpha=1.0, link="sigmoid", beta=1.0)
    with pytest.raises(ValueError, match="loss 'synpo' takes no reference"):
        preference_loss("synpo", policy, policy)
    single = PairLogprobs.from_unpaired([torch.tensor([-1.0])], [True])
    with pytest.raises(
        ValueError, match=r"loss 'dpo' compares two responses, but a row has one; .*: kto, apo_zero_unpaired"
    ):
        preference_loss("dpo", single, single)
    with pytest.raises(ValueError, match="dpo needs a reference"):
        preference_loss("dpo", policy)
    with pytest.raises(ValueError, match="a reference was given"):
        preference_loss("dpo", policy, policy, reference_free=True)
