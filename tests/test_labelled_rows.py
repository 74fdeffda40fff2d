"""kto in the trainer: rows of pairs and of single responses, mismatched responses, metrics over micro-batches, and whole runs."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import Pair, read_manifest, write_manifest
from synpo_fast.data.data_key import data_key
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.losses import PairLogprobs, kto
from synpo_fast.models import load_policy
from synpo_fast.models.policy import Sample
from synpo_fast.references import FrozenCopy
from synpo_fast.scoring import PairEncoder, score_pairs
from synpo_fast.training.metrics import add_sums, means_of
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.run_data import RunData, read_data, with_mismatched_responses
from tests.world import options

PROMPTS = tuple(range(5, 25)), tuple(range(30, 40)), (7, 8, 9)
RESPONSES = ((7, 8, 9, 2), (30, 31, 2), (12, 2), (40, 41, 42, 43, 44, 2))
# Two labelled responses, a desirable one and an undesirable one; the last response of each sample is the mismatched one.
ROWS = [
    EncodedPair(
        Sample(PROMPTS[0], (*RESPONSES[:2], RESPONSES[3])), "a", (), labels=((0, True), (1, False)), mismatched=2
    ),
    EncodedPair(Sample(PROMPTS[1], (RESPONSES[2], RESPONSES[0])), "b", (), labels=((0, True),), mismatched=1),
    EncodedPair(Sample(PROMPTS[2], (RESPONSES[3], RESPONSES[1])), "c", (), labels=((0, False),), mismatched=1),
]
OPTIONS = {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.2}


@pytest.fixture(scope="module")
def policy():
    policy = load_policy("tiny:text", device="cpu")
    with torch.no_grad():  # log-probs of a fresh model hardly differ
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    return policy


def module_of(policy, **more):
    values = {"loss_type": "kto", **OPTIONS, **more}
    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_peft=False, **values)
    module = PairModule(policy, config)
    module.reference = FrozenCopy(policy)
    with torch.no_grad():
        for parameter in module.reference.policy.parameters():
            parameter.mul_(1.2)
    return module


def alone(policy, prompt, response):
    """The token log-probs of one response in a row of its own."""
    return policy([Sample(prompt, (response,))], share_prefix=False)[0][0]


def by_hand(module, rows):
    """The batch's loss and reference point, from responses that run one by one."""
    responses, references, labels, ratios = [], [], [], []
    for row in rows:
        for index, label in row.labels:
            both = [alone(policy, row.sample.prompt, row.sample.responses[index]) for policy in models(module)]
            responses.append(both[0])
            references.append(both[1].detach())
            labels.append(label)
        other = [alone(policy, row.sample.prompt, row.sample.responses[row.mismatched]) for policy in models(module)]
        ratios.append(float(other[0].detach().sum() - other[1].detach().sum()))
    kl = max(0.0, sum(ratios) / len(ratios))
    given = PairLogprobs.from_unpaired(responses, labels, kl=torch.tensor(kl))
    return kto(given, PairLogprobs.from_unpaired(references, labels), **OPTIONS).losses.mean(), kl


def models(module):
    return module.policy, module.reference.policy


def gradients(loss, policy):
    return dict(zip(dict(policy.named_parameters()), torch.autograd.grad(loss, list(policy.parameters())), strict=True))


@pytest.mark.parametrize("more", [{}, {"share_prefix": False}], ids=["shared", "unshared"])
def test_loss_gradients_and_reference_point_equal_responses_run_one_by_one(policy, more):
    module = module_of(policy, **more)
    assert [row.num_pairs for row in ROWS] == [2, 1, 1]
    expected, kl = by_hand(module, ROWS)
    assert kl > 0.01, "a reference point of 0 would show nothing"
    wanted = gradients(expected, policy)
    loss, sums = module(ROWS, 1 / 4)
    found = gradients(loss, policy)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm()) <= 1e-4 * float(wanted[name].norm()), name
    assert float(sums["pairs"]) == 4
    tokens = [sum(map(len, row.sample.responses)) - len(row.sample.responses[row.mismatched]) for row in ROWS]
    assert float(sums["tokens"]) == sum(map(len, PROMPTS)) + sum(tokens)
    assert means_of({name: float(value) for name, value in sums.items()})["kl"] == pytest.approx(kl, rel=1e-5)


def test_metrics_are_means_over_responses_whatever_the_split(policy):
    module = module_of(policy, loss_type="apo_zero_unpaired")  # kto's reference point depends on the micro-batch
    whole, sums = module(ROWS, 1 / 4)
    total, parts = {}, 0.0
    for row in ROWS:
        loss, more = module([row], 1 / 4)
        parts += float(loss.detach())
        add_sums(total, more)
    assert parts == pytest.approx(float(whole), rel=1e-5)
    together, apart = (means_of({name: float(value) for name, value in each.items()}) for each in (sums, total))
    assert apart == pytest.approx(together, rel=1e-4, abs=1e-6)
    rewards = {True: [], False: []}
    for row in ROWS:
        for index, label in row.labels:
            own, ref = (
                float(alone(each, row.sample.prompt, row.sample.responses[index]).sum()) for each in models(module)
            )
            rewards[label].append(OPTIONS["beta"] * (own - ref))
    chosen, rejected = (sum(values) / 2 for values in (rewards[True], rewards[False]))
    assert together["rewards/chosen"] == pytest.approx(chosen, rel=1e-4)
    assert together["rewards/rejected"] == pytest.approx(rejected, rel=1e-4)
    assert together["rewards/margins"] == pytest.approx(chosen - rejected, rel=1e-4)
    right = sum(value > 0 for value in rewards[True]) + sum(value < 0 for value in rewards[False])
    assert together["rewards/accuracies"] == pytest.approx(right / 4)


def test_the_reference_point_is_a_mean_over_all_ranks_without_placeholders(policy, monkeypatch):
    module = module_of(policy)
    _, own = by_hand(module, ROWS[:1])
    _, others = by_hand(module, ROWS[1:])
    assert own > 0 and others > 0

    def all_reduce(sums):
        """Adds what another rank with the other two rows has."""
        sums += torch.tensor([2 * others, 2.0], dtype=torch.float64)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    for scale, expected in ((1.0, (own + 2 * others) / 3), (0.0, others)):
        _, sums = module(ROWS[:1], scale)
        assert means_of({name: float(value) for name, value in sums.items()})["kl"] == pytest.approx(expected, rel=1e-4)


def test_pairs_and_labelled_rows_are_encoded_as_labelled_responses(policy):
    encoder = PairEncoder.of(policy, labelled=True, max_tokens=60)
    pair = Pair(
        "What?", "A good answer.", "A bad one.", mismatched="Another row's text, longer than sixty tokens allow. " * 4
    )
    good, bad = Pair("What?", "Good.", "", loss="desirable"), Pair("What?", "", "Bad.", loss="undesirable")
    rows = [encoder(each, None) for each in (pair, good, bad)]
    assert [row.labels for row in rows] == [((0, True), (1, False)), ((0, True),), ((0, False),)]
    assert all(not row.comparisons for row in rows)
    texts = [[policy.tokenizer.decode(ids[:-1]) for ids in row.sample.responses] for row in rows]
    assert texts == [[pair.chosen, pair.rejected, pair.mismatched], ["Good."], ["Bad."]]
    assert [row.mismatched for row in rows] == [2, None, None]
    assert PairEncoder.of(policy)(pair, None).comparisons == ((0, 1),)
    (_, nothing), (none, rejected) = score_pairs(policy, [good, bad])
    assert len(nothing) == len(none) == 0
    assert torch.equal(rejected, score_pairs(policy, [Pair("What?", "Good.", "Bad.")], share_prefix=False)[0][1])


@pytest.fixture(scope="module")
def mixed(world, tmp_path_factory):
    """The world's manifest with every third row desirable, every third one undesirable, and one sft row."""
    pairs = list(read_manifest(world / "pairs.jsonl"))
    pairs[::3] = [replace(pair, rejected="", loss="desirable") for pair in pairs[::3]]
    pairs[1::3] = [replace(pair, chosen="", loss="undesirable") for pair in pairs[1::3]]
    pairs[2] = replace(pairs[2], rejected="", loss="sft")
    file = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    write_manifest(file, pairs)
    assert {row.get("label") for row in map(json.loads, file.read_text().splitlines())} == {True, False, None}
    return file


def losses_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["kl"], row["grad_norm"]) for row in rows if "loss" in row}


def test_a_run_on_a_mixed_manifest_resumes_and_may_precompute_its_reference(world, mixed, tmp_path, in_one_process):
    def values(name, **more):
        more = {
            "loss_type": "kto",
            "beta": 0.5,
            "max_steps": 4,
            "save_steps": 2,
            "max_grad_norm": 1.0,
            "warmup_ratio": 0.0,
            **more,
        }
        more |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "video_root": str(world)}
        return {**options(world, tmp_path / name), "train_file": str(mixed), "report": False, **more}

    in_one_process(values("whole"))
    whole = losses_of(tmp_path / "whole")
    assert sorted(whole) == [1, 2, 3, 4]
    assert whole[1][1] == 0.0, "the reference is the policy"
    assert any(kl > 0 for _, kl, _ in whole.values())
    in_one_process(values("resumed", resume=str(tmp_path / "whole" / "checkpoint-000002")))
    assert losses_of(tmp_path / "resumed") == {step: whole[step] for step in (3, 4)}
    in_one_process(values("file", reference="precomputed"))
    for step, numbers in losses_of(tmp_path / "file").items():
        assert numbers == pytest.approx(whole[step], rel=1e-4, abs=1e-6)


def test_evaluation_and_refusals_of_labelled_rows(world, mixed, tmp_path, in_one_process):
    def values(name, **more):
        values = options(world, tmp_path / name, train_file=str(mixed), video_root=str(world), report=False)
        return {**values, **more}

    refusal = (
        r"mixed\.jsonl:1: one response with a label, but loss_type=synpo compares two: train with loss_type=kto or apo"
    )
    with pytest.raises(ValueError, match=refusal):
        in_one_process(values("refused"))
    of_sft = (
        r'mixed\.jsonl:1: .* loss_type=sft reads rows of prompt and chosen with "loss": "sft", or pairs: train with'
    )
    with pytest.raises(ValueError, match=of_sft):
        read_data(TrainConfig(**values("refused", loss_type="sft")))
    more = {"loss_type": "kto", "max_steps": 1, "eval_split": 0.25, "eval_steps": 1}
    in_one_process(values("evaluated", **more))
    rows = [json.loads(line) for line in (tmp_path / "evaluated" / "metrics.jsonl").read_text().splitlines()]
    first, last = [row for row in rows if "eval_loss" in row]
    assert first["eval_loss"] != last["eval_loss"] and first["eval_kl"] == 0.0
    assert {"eval_rewards/margins", "eval_rewards/accuracies"} <= first.keys()


def test_the_reference_point_of_held_out_rows_of_one_video(group, tmp_path, caplog):
    """Their mismatched responses come from training rows; those of training rows do not depend on what is held out."""
    train = [Pair("What?", f"{name}+", f"{name}-", video=f"{name}.mp4") for name in "ab"]
    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", loss_type="kto")
    found = []
    for held_out in ([], [Pair("What?", "c+", "c-", video="c.mp4"), Pair("What?", "d+", "d-", video="c.mp4")]):
        data = with_mismatched_responses(config, RunData(train, held_out, tmp_path, tmp_path, data_key(train)))
        found.append([pair.mismatched for pair in data.train])
        assert data.key == data_key(data.train) != data_key(train)
    assert found == [["b+", "a-"]] * 2
    assert [pair.mismatched for pair in data.evaluation] == ["a+", "a-"]
    assert "raise per_device_train_batch_size above 1" in caplog.text
    split = replace(config, per_device_train_batch_size=4, max_batch_tokens=900)
    with_mismatched_responses(split, RunData(train, [], tmp_path, tmp_path, data_key(train)))
    assert "and max_batch_tokens=900 decides how many these are" in caplog.text
