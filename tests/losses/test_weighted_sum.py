"""Weighted sums of losses: their value from the members, their options, references, units and metrics, and what is refused."""

import pytest
import torch

from synpo_fast.losses import LOSSES, AuxiliaryNLL, PairLogprobs, nll, preference_loss, spec_of
from synpo_fast.losses.metric_sums import metric_means, metric_sums
from synpo_fast.losses.units import describe_units, loss_unit, reward_unit

from . import truth

LENGTHS = [(3, 5), (1, 2), (6, 2)]
MPO = "dpo,bco_pair,sft"


def inputs(mask=None):
    pairs, reference = truth.ragged_pairs(LENGTHS), truth.ragged_pairs(LENGTHS, seed=1)
    return truth.as_logprobs(pairs, preference=mask), truth.as_logprobs(reference)


def test_the_sum_of_members_that_read_different_things():
    policy, reference = inputs()
    options = {"beta": 0.3, "alpha": 4.0, "gamma": 0.7, "label_smoothing": 0.1}
    found = preference_loss("synpo, sigmoid ,simpo,cpo", policy, reference, loss_weights=[0.5, 2, 0, 1.5], **options)
    parts = [
        preference_loss("synpo", policy, alpha=4.0, beta=0.3),
        preference_loss("dpo", policy, reference, beta=0.3, label_smoothing=0.1),
        preference_loss("simpo", policy, beta=0.3, gamma=0.7, label_smoothing=0.1),
        preference_loss("cpo", policy, beta=0.3, label_smoothing=0.1),
    ]
    expected = 0.5 * parts[0].losses + 2 * parts[1].losses + 1.5 * parts[3].losses
    torch.testing.assert_close(found.losses, expected, rtol=1e-12, atol=0)
    for name, part in zip(("synpo", "dpo", "simpo", "cpo"), parts, strict=True):
        torch.testing.assert_close(found.metrics[f"loss/{name}"], part.losses.mean(), rtol=1e-12, atol=0)
    assert found.chosen_rewards.equal(parts[0].chosen_rewards)
    assert found.metrics["rewards/margins"].equal(parts[0].metrics["rewards/margins"])


def test_weights_are_1_by_default_and_sft_takes_nll_reduce():
    policy, reference = inputs()
    for reduce in ("token_mean", "batch_token_mean", "sum"):
        found = preference_loss("sft,dpo", policy, reference, nll_reduce=reduce)
        own = preference_loss("dpo", policy, reference)
        torch.testing.assert_close(found.losses, own.losses + nll(policy, reduce=reduce), rtol=1e-12, atol=0)
        assert found.chosen_rewards.equal(own.chosen_rewards)


def test_gradcheck():
    base, reference = inputs([True, False, True])

    def losses(chosen, rejected):
        policy = type(base)(chosen, rejected, base.chosen_offsets, base.rejected_offsets, preference=base.preference)
        return preference_loss(MPO, policy, reference, loss_weights=(0.8, 0.2, 1.0), ld_alpha=0.5).losses

    _, chosen, rejected = truth.with_grad(base)
    assert torch.autograd.gradcheck(losses, (chosen, rejected))


def test_rows_without_a_preference_have_the_nll_of_the_members_alone():
    policy, reference = inputs([True, False, True])
    truth_nll = nll(policy)[1].item()
    found = preference_loss(MPO, policy, reference, loss_weights=(0.8, 0.2, 0.3), nll_reduce="token_mean").losses
    assert found[1].item() == pytest.approx(0.3 * truth_nll, rel=1e-12)
    found = preference_loss("dpo,aot", policy, reference).losses
    assert found[1].item() == pytest.approx(truth_nll, rel=1e-12)
    found = preference_loss("dpo,aot", policy, reference, auxiliary=AuxiliaryNLL(weight=0.2)).losses
    assert found[1].item() == pytest.approx(0.2 * truth_nll, rel=1e-12)


def test_pair_weights_multiply_preference_terms_alone():
    policy, reference = inputs()
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    for name in ("dpo", "synpo", "bco_pair"):
        ref = reference if LOSSES[name].needs_reference else None
        plain = preference_loss(name, policy, ref).losses
        found = preference_loss(name, policy, ref, pair_weights=weights, auxiliary=AuxiliaryNLL())
        torch.testing.assert_close(found.losses, weights * plain + nll(policy), rtol=1e-12, atol=0)
    found = preference_loss("dpo,sft", policy, reference, pair_weights=weights, nll_reduce="token_mean").losses
    expected = weights * preference_loss("dpo", policy, reference).losses + nll(policy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for wrong in (weights[:2], weights.int(), weights.clone().requires_grad_()):
        with pytest.raises(ValueError, match="weights are"):
            preference_loss("dpo", policy, reference, pair_weights=wrong)
    for name in ("aot", "dpo,aot_unpaired"):
        with pytest.raises(ValueError, match="compares sorted values"):
            preference_loss(name, policy, reference, pair_weights=weights)


def test_a_reference_goes_to_the_members_that_read_one():
    policy, reference = inputs()
    spec = spec_of("simpo,aot,dpo")
    assert spec.needs_reference and spec.reads_reference({"reference_free": True}) and spec.sorts_batch
    found = preference_loss("simpo,aot,dpo", policy, reference, reference_free=True).metrics
    expected = preference_loss("dpo", policy, reference_free=True).losses.mean()
    torch.testing.assert_close(found["loss/dpo"], expected, rtol=1e-12, atol=0)
    assert not spec_of("synpo,sft").needs_reference and spec_of("synpo,sft").has_nll
    with pytest.raises(ValueError, match="no loss of dpo,sft reads a reference"):
        preference_loss("dpo,sft", policy, reference, reference_free=True)
    with pytest.raises(ValueError, match="takes no reference"):
        preference_loss("synpo,sft", policy, reference)


def test_metrics_of_the_members_are_averaged_over_pairs():
    tokens = {"chosen_tokens": torch.tensor(10.0), "rejected_tokens": torch.tensor(9.0)}
    outputs = [preference_loss(MPO, *inputs(mask)) for mask in (None, [True, False, False])]
    total = {}
    for output in outputs:
        for name, value in metric_sums(output, tokens).items():
            total[name] = total.get(name, 0.0) + value.item()
    found = metric_means(total)
    for member in MPO.split(","):
        mean = sum(output.metrics[f"loss/{member}"].item() for output in outputs) / 2  # both batches have 3 pairs
        assert found[f"loss/{member}"] == pytest.approx(mean, rel=1e-6)
    losses = torch.cat([output.losses for output in outputs])
    assert sum(found[f"loss/{member}"] for member in MPO.split(",")) == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo,ppo", {}, "unknown loss 'ppo', expected one of synpo, dpo"),
        ("dpo,", {}, "unknown loss ''"),
        ("dpo,sigmoid", {}, "names dpo more than once"),
        ("dpo,sft", {"gamma": 1.0}, "has no option gamma; it has nll_reduce, beta|has no option gamma"),
        ("dpo,sft", {"loss_weights": (1.0,)}, "expected 2 numbers, one for each of dpo, sft"),
        ("dpo,sft", {"loss_weights": (1.0, -1.0)}, "a number of loss_weights is -1.0, expected at least 0"),
        ("dpo,sft", {"loss_weights": (0.0, 0.0)}, "loss_weights are all 0"),
        ("dpo", {"loss_weights": (1.0,)}, "loss 'dpo' has no option loss_weights"),
        ("dpo,bco_pair", {"f_divergence": "forward_kl"}, "bco_pair has no form with another divergence"),
    ],
)
def test_what_does_not_fit_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(name, *inputs(), **options)


def test_units_name_members_and_weights():
    options = {"loss_weights": [0.8, 0.2, 1.0], "beta": 0.3, "variant": None}
    assert loss_unit(MPO, options) == "0.8 dpo + 0.2 bco_pair + 1 sft loss"
    assert loss_unit("dpo,sft", {"variant": "ipo"}) == "1 dpo + 1 sft ipo loss"
    assert reward_unit(MPO, options) == "beta·nats over the reference, beta=0.3"
    assert reward_unit("sft,synpo,dpo") == "probability"
    assert describe_units("synpo,dpo") == "rewards are G (probability), log-probs means (nats per token)"


def test_single_responses_are_added_to_each_other_and_not_to_pairs():
    couples = [(torch.tensor([-1.0, -0.5]), torch.tensor([])), (torch.tensor([]), torch.tensor([-2.0]))]
    policy = PairLogprobs.from_pairs(couples, unpaired=[True, True], kl=torch.tensor(0.4))
    reference = PairLogprobs.from_pairs([(y - 0.2, z - 0.3) for y, z in couples], unpaired=[True, True])
    output = preference_loss("kto,apo_zero_unpaired,sft", policy, reference, loss_weights=(1.0, 0.5, 2.0))
    alone = [preference_loss(name, policy, reference).losses for name in ("kto", "apo_zero_unpaired")]
    torch.testing.assert_close(output.losses, alone[0] + 0.5 * alone[1] + 2.0 * torch.tensor([1.5, 0.0]))
    with pytest.raises(
        ValueError, match=r"'kto,dpo' mixes losses of single responses \(kto\) with losses that compare two"
    ):
        preference_loss("kto,dpo", policy, reference)
