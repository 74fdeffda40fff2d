"""One micro-batch: the loss by the papers' formulas, sums that add up, and no gradient from a loss that is not finite."""

import math

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import PairTooLong
from synpo_fast.data.pair import Pair, Response
from synpo_fast.models import load_policy
from synpo_fast.models.lora import add_lora
from synpo_fast.pair_logprobs import pair_logprobs
from synpo_fast.references import AdapterOff, FrozenCopy
from synpo_fast.scoring import PairEncoder
from synpo_fast.training.metrics import add_sums, means_of
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.run_data import encoder_of

PAIRS = [
    Pair("Say a.", "first answer", "no", id="a", ground_truth="truth one"),
    Pair("Say b!", "b", "a long and wrong answer", id="b", ground_truth="two"),
    Pair("Say c", "only this", "", id="c", loss="sft", ground_truth="three"),
    Pair("Say d?", "delta", "gamma", id="d", ground_truth="a fourth truth"),
]


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny:text", device="cpu")


def config(**more):
    return TrainConfig(model_name_or_path="tiny:text", train_file="x", output_dir="x", use_peft=False, **more)


def encoded(policy, pairs, **more):
    encoder = PairEncoder.of(policy, **more)
    return [encoder(pair, None) for pair in pairs]


def lists(policy, pairs):
    with torch.no_grad():
        return [[values.double().tolist() for values in sample] for sample in policy([pair.sample for pair in pairs])]


def nll(values):
    return -sum(values) / len(values)


def synpo(chosen, rejected):
    G = [math.exp(sum(values) / len(values)) for values in (chosen, rejected)]
    A = sum(math.exp(value) for value in chosen) / len(chosen)
    return -1 / (1 + math.exp(-30 * (G[0] - G[1]))) - 0.2 * A


def test_synpo_with_a_row_that_only_trains_on_chosen(policy):
    pairs = encoded(policy, PAIRS)
    loss, sums = PairModule(policy, config())(pairs, 0.25)
    expected = [nll(chosen[0]) if len(chosen) == 1 else synpo(*chosen) for chosen in lists(policy, pairs)]
    assert float(loss) == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert float(sums["loss"]) == pytest.approx(sum(expected), abs=1e-5)
    assert (float(sums["pairs"]), float(sums["preference_pairs"])) == (4, 3)


def test_sft_is_the_mean_nll_of_the_chosen_responses(policy):
    pairs = encoded(policy, PAIRS)
    loss, _ = PairModule(policy, config(loss_type="sft"))(pairs, 1.0)
    assert float(loss) == pytest.approx(sum(nll(each[0]) for each in lists(policy, pairs)), abs=1e-5)


def test_sft_does_not_run_responses_that_its_loss_never_reads(policy):
    scored = tuple(
        Response(text, score) for text, score in (("good", 3.0), ("worse, and by far the longest", 1.0), ("fair", 2.0))
    )
    pairs = [*PAIRS, Pair("Say d", responses=scored, id="d")]
    whole, lean = encoded(policy, pairs), encoded(policy, pairs, chosen_only=True)
    assert [len(pair.sample.responses) for pair in whole] == [2, 2, 1, 2, 3]
    assert [len(pair.sample.responses) for pair in lean] == [1, 1, 1, 1, 2]
    module = PairModule(policy, config(loss_type="sft"))
    (expected, sums), (found, own) = module(whole, 1.0), module(lean, 1.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(own["pairs"]) == float(sums["pairs"]) == 7
    assert float(own["tokens"]) < float(sums["tokens"]) and float(own["rejected_tokens"]) == 0
    longest = len(lean[-1].sample.prompt) + max(map(len, lean[-1].sample.responses))
    assert len(encoded(policy, pairs[-1:], chosen_only=True, max_tokens=longest)) == 1
    with pytest.raises(PairTooLong):
        encoded(policy, pairs[-1:], max_tokens=longest)


def test_a_run_of_sft_leaves_out_rejected_responses_and_its_profile_keeps_them(policy):
    lean = encoder_of(config(loss_type="sft"), policy)
    assert lean.chosen_only and not lean.labelled
    assert not any(
        encoder_of(other, policy).chosen_only
        for other in (
            config(loss_type="sft", profile=2),
            config(loss_type="dpo,sft"),
            config(),
            config(loss_type="kto"),
        )
    )


def test_an_auxiliary_nll_on_the_ground_truth(policy):
    pairs = encoded(policy, PAIRS, with_ground_truth=True)
    module = PairModule(policy, config(auxiliary_nll=0.1, auxiliary_target="ground_truth"))
    loss, _ = module(pairs, 1.0)
    # A row without a preference keeps the auxiliary term alone (SYSTEMS.md 3: "a row may be marked CE-only").
    terms = [0.1 * nll(each[-1]) + (synpo(*each[:2]) if len(each) == 3 else 0.0) for each in lists(policy, pairs)]
    assert float(loss) == pytest.approx(sum(terms), abs=1e-5)


def test_a_pair_without_a_ground_truth_beside_others_is_refused(policy):
    pairs = [*encoded(policy, PAIRS[:1], with_ground_truth=True), *encoded(policy, PAIRS[1:2])]
    with pytest.raises(ValueError, match="1 of 2 pairs"):
        pair_logprobs(pairs, policy([pair.sample for pair in pairs]))


@pytest.mark.parametrize("loss_type", ["synpo", "simpo", "orpo", "cpo", "cpo_simpo", "sft"])
@pytest.mark.parametrize("parts", [[[0], [1], [3]], [[0, 1], [3]], [[0, 1, 3]]])
def test_gradient_and_metrics_do_not_depend_on_the_split_into_micro_batches(policy, loss_type, parts):
    pairs = encoded(policy, PAIRS)
    module = PairModule(policy, config(loss_type=loss_type))
    whole, sums = module([pairs[i] for i in (0, 1, 3)], 1 / 3)
    weight = policy.base.get_output_embeddings().weight
    (expected,) = torch.autograd.grad(whole, weight)
    total, found = {}, torch.zeros_like(weight)
    for part in parts:
        loss, more = module([pairs[i] for i in part], 1 / 3)
        found += torch.autograd.grad(loss, weight)[0]
        add_sums(total, more)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    as_numbers = [means_of({name: float(value) for name, value in each.items()}) for each in (sums, total)]
    assert as_numbers[1] == pytest.approx(as_numbers[0], rel=1e-4, abs=1e-6)
    assert as_numbers[0]["loss"] == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(policy, bad, monkeypatch):
    """An infinite loss may have a finite gradient (here it is infinite by an added constant): the step must be skipped."""
    from dataclasses import replace

    module = PairModule(policy, config())
    original = module.loss_of_logps
    monkeypatch.setattr(module, "loss_of_logps", lambda *args: replace(out := original(*args), losses=out.losses + bad))
    loss, _ = module(encoded(policy, PAIRS[:2]), 1.0)
    (gradient,) = torch.autograd.grad(loss, policy.base.get_output_embeddings().weight)
    assert not torch.isfinite(gradient).any()


def test_a_reference_is_no_part_of_what_trains(policy):
    from synpo_fast.references import FrozenCopy

    module = PairModule(policy, config(loss_type="dpo"))
    before = len(list(module.parameters()))
    module.reference = FrozenCopy(policy)
    assert len(list(module.parameters())) == before
    loss, _ = module(encoded(policy, PAIRS[:2]), 0.5)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [("adapter_off", True), ("frozen_copy", True), ("frozen_copy", False)],
    ids=["adapter_off", "frozen_copy", "frozen_copy-tower-trains"],
)
def test_policy_and_reference_share_a_pass_of_the_tower_unless_it_trains(kind, frozen):
    policy = load_policy("tiny:qwen2_5_vl", device="cpu", freeze_vision=frozen)
    encoder = PairEncoder.of(policy)
    frames = [torch.randint(0, 256, (4, 56, 56, 3), dtype=torch.uint8) for _ in range(2)]
    pairs = [encoder(Pair("q", "yes", "no", video=video), video) for video in frames]
    if kind == "adapter_off":
        add_lora(policy, r=2, alpha=2, dropout=0.0)
    module = PairModule(policy, config(loss_type="dpo"))
    module.reference = AdapterOff(policy) if kind == "adapter_off" else FrozenCopy(policy)
    towers = [policy, module.reference.policy] if kind == "frozen_copy" else [policy]
    seen = []
    for one in towers:
        one.family.vision_modules(one.base)[0].register_forward_hook(lambda *_: seen.append(1))
    losses = []
    for module.encodes_once, passes in ((True, 1 if frozen else 2), (False, 2)):
        seen.clear()
        losses.append(float(module(pairs, 1.0)[0]))
        assert len(seen) == passes, "both videos are one call of the tower"
    assert losses[0] == losses[1] and losses[0] == pytest.approx(2 * math.log(2), abs=1e-5)
    assert policy.feature_store is None and module.reference.policy.feature_store is None
