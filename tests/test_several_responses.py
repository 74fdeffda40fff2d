"""A row with several responses: it trains as its comparisons would as separate rows, and runs each response once."""

import json

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import Pair, Response, write_manifest
from synpo_fast.data.comparisons import compare_responses
from synpo_fast.data.encoded import EncodedPair, PairTooLong
from synpo_fast.data.loader import StepBatch
from synpo_fast.errors import UserError
from synpo_fast.models import load_policy
from synpo_fast.models.policy import Sample
from synpo_fast.references import FrozenCopy
from synpo_fast.scoring import PairEncoder, score_pairs
from synpo_fast.training.metrics import add_sums, means_of
from synpo_fast.training.out_of_memory import tokens_of
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.reward_gradients import reward_gradient_norms
from synpo_fast.training.run_data import read_data
from synpo_fast.training.step import Stepper
from tests.world import options

PROMPT = tuple(range(5, 25))
RESPONSES = ((7, 8, 9, 2), (30, 31, 2), (12, 2), (40, 41, 42, 43, 44, 2), (50, 2))
COMPARISONS = ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))
TRUTH = 4
ORDINARY = EncodedPair(Sample(PROMPT[:9], (*RESPONSES[1:3], RESPONSES[0]), name="b"), "b", ground_truth=2)
SFT = EncodedPair(Sample(PROMPT[3:], RESPONSES[2:4]), "c", (), target=0, ground_truth=1)


def row(truth=False):
    responses = RESPONSES if truth else RESPONSES[:4]
    return EncodedPair(Sample(PROMPT, responses, name="a"), "a", COMPARISONS, ground_truth=TRUTH if truth else None)


def separate(truth=False):
    """The row's comparisons, each as a row of its own."""
    rows = []
    for place, indices in enumerate(COMPARISONS):
        responses = tuple(RESPONSES[index] for index in indices) + ((RESPONSES[TRUTH],) if truth else ())
        rows.append(EncodedPair(Sample(PROMPT, responses), f"a{place}", ground_truth=2 if truth else None))
    return rows


@pytest.fixture(scope="module")
def policy():
    policy = load_policy("tiny:text", device="cpu")
    with torch.no_grad():  # log-probs of a fresh model hardly differ
        for parameter in policy.parameters():
            parameter.mul_(1.2)
    return policy


def module_of(policy, **more):
    config = TrainConfig(model_name_or_path="tiny:text", train_file="x", output_dir="x", use_peft=False, **more)
    module = PairModule(policy, config)
    if config.needs_reference:
        module.reference = FrozenCopy(policy)
        with torch.no_grad():
            for parameter in module.reference.policy.parameters():
                parameter.mul_(0.8)
    return module


def step_of(module, micros):
    """Loss, gradients and metrics of a step that consists of these micro-batches."""
    num_pairs = sum(pair.num_pairs for pairs in micros for pair in pairs)
    module.zero_grad()
    loss, sums = torch.zeros(()), {}
    for pairs in micros:
        part, more = module(pairs, 1 / num_pairs)
        part.backward()
        loss += part.detach()
        add_sums(sums, more)
    gradients = {name: parameter.grad.clone() for name, parameter in module.policy.named_parameters()}
    return float(loss), gradients, {name: float(value) for name, value in sums.items()}


CASES = {
    "synpo": {"loss_type": "synpo"},
    "orpo": {"loss_type": "orpo"},
    "sft": {"loss_type": "sft"},
    "dpo": {"loss_type": "dpo"},
    "truth": {"loss_type": "dpo", "auxiliary_nll": 0.3, "auxiliary_target": "ground_truth"},
    "unshared": {"loss_type": "synpo", "share_prefix": False},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_that_of_its_comparisons_as_separate_rows(policy, case):
    truth = case == "truth"
    others = [ORDINARY, SFT] if truth else [ORDINARY, EncodedPair(SFT.sample, "c", ())]
    if not truth:
        others[0] = EncodedPair(Sample(PROMPT[:9], RESPONSES[1:3]), "b")
    module = module_of(policy, **CASES[case])
    wanted, expected, metrics = step_of(module, [separate(truth)[:2], [*separate(truth)[2:], others[0]], [others[1]]])
    found, gradients, sums = step_of(module, [[row(truth), others[0]], [others[1]]])
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= 1e-4 * float(expected[name].norm()), name
    assert sums["pairs"] == metrics["pairs"] == len(COMPARISONS) + 2
    assert sums.pop("tokens") < metrics.pop("tokens"), "the prompt and a shared response count once: they run once"
    assert sums == pytest.approx(metrics, rel=1e-5)
    assert means_of(sums)["loss"] == pytest.approx(found, rel=1e-5)


def test_tokens_count_what_runs_without_the_ground_truth(policy):
    _, sums = module_of(policy)([row(truth=True)], 1.0)
    assert float(sums["tokens"]) == len(PROMPT) + sum(len(response) for response in RESPONSES[:4])


def test_a_step_counts_comparisons_and_its_micro_batches_count_rows(group):
    config = TrainConfig(
        model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True, per_device_train_batch_size=2
    )
    rows = [row(), EncodedPair(SFT.sample, "c", ()), row()]
    stepper = Stepper(config, None, torch.device("cpu"))
    micros, pairs_in_step = stepper.agree_on_micro_batches(StepBatch(0, 0, rows, 3, [], 0.0))
    assert [len(pairs) for pairs, _ in micros] == [2, 1]
    assert pairs_in_step == 2 * len(COMPARISONS) + 1


def test_the_norms_of_reward_gradients_are_means_over_comparisons(policy, group):
    module = module_of(policy)
    found = reward_gradient_norms(module, [[row()]])
    assert found == pytest.approx(reward_gradient_norms(module, [separate()[:3], separate()[3:]]), rel=1e-4)
    assert found["diagnostics/logps_mean/chosen"] < 0


# ---- from a manifest through training ----


def several_rows(world, folder):
    """Two manifests of the same comparisons: rows with four responses, and a row for each comparison."""
    folder.mkdir()
    responses = [Response(f"A {word} thing moves.", score) for word, score in zip("abcd", (5, 9.5, 2, 5), strict=True)]
    rows, pairs = [], []
    for place in range(4):
        fields = {"prompt": f"What moves in {place}?", "video": f"v{place}.mp4"}
        row = Pair(**fields, id=f"r{place}", responses=tuple(responses[place:] + responses[:place]))
        rows.append(row)
        compared = [(a, b) for a in responses for b in responses if a.score - b.score >= 4]
        assert len(compared) == 3
        pairs += [Pair(**fields, chosen=a.text, rejected=b.text, id=f"{row.id} {a.text} {b.text}") for a, b in compared]
    write_manifest(folder / "rows.jsonl", rows)
    write_manifest(folder / "pairs.jsonl", pairs)
    return folder


@pytest.mark.parametrize(
    "more",
    [{"loss_type": "synpo"}, {"loss_type": "dpo", "reference": "precomputed", "beta": 0.5}],
    ids=["synpo", "dpo-precomputed"],
)
def test_training_on_rows_equals_training_on_their_comparisons(world, tmp_path, in_one_process, capsys, more):
    folder, logs = several_rows(world, tmp_path / "data"), {}
    for name, num_rows in (("rows", 4), ("pairs", 12)):
        values = options(
            world, tmp_path / name, train_file=str(folder / f"{name}.jsonl"), video_root=str(world), max_steps=3,
            eval_file=str(folder / f"{name}.jsonl"), num_eval_captions=1, max_new_tokens=2, report=False, **more,
        )  # fmt: skip
        values |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": num_rows, "save_steps": 0}
        gap = {"min_score_gap": 4.0} if name == "rows" else {}
        in_one_process({**values, **gap})
        logs[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    said = capsys.readouterr().err
    assert "pairs_from=all: 12 comparisons of 4 rows with several responses, which use 16 of 16 responses" in said
    assert len(logs["rows"]) == len(logs["pairs"]) == 5
    for found, wanted in zip(logs["rows"], logs["pairs"], strict=True):
        names = {"loss", "rewards/chosen", "rewards/margins", "logps/rejected", "nll_loss", "grad_norm", "epoch"}
        if "eval_loss" in found:  # min_score_gap does not act on the evaluation: 5 comparisons of a row
            continue
        for key in names & wanted.keys():
            assert found[key] == pytest.approx(wanted[key], rel=2e-4, abs=1e-6), key
        assert found["num_tokens"] < wanted["num_tokens"] / 2
        assert found["pairs_per_s"] * found["step_s"] == pytest.approx(12)


def test_the_evaluation_compares_by_pairs_from(world, tmp_path):
    folder = several_rows(world, tmp_path / "data")
    values = options(world, tmp_path / "run", train_file=str(folder / "rows.jsonl"), video_root=str(world))
    values |= {"eval_file": str(folder / "rows.jsonl"), "min_score_gap": 4.0}
    for pairs_from, train, evaluation in (("all", 3, 5), ("best_rest", 3, 3), ("best_worst", 1, 1)):
        data = read_data(TrainConfig(**values, pairs_from=pairs_from))
        assert {len(pair.comparisons) for pair in data.train} == {train}
        assert {len(pair.comparisons) for pair in data.evaluation} == {evaluation}
    with pytest.raises(UserError, match=r"no pair of .* is left to train on"):
        read_data(TrainConfig(**{**values, "min_score_gap": 8.0}))


def test_log_probs_of_each_response(policy):
    pair = Pair("q", responses=(Response("first", 1.0), Response("second one", 3.0), Response("x", 2.0)))
    with torch.no_grad():
        (found,) = score_pairs(policy, [pair])
        for place, response in enumerate(pair.responses):
            ((alone, _),) = score_pairs(policy, [Pair("q", response.text, "", loss="sft")])
            torch.testing.assert_close(found[place], alone, rtol=0, atol=1e-5)
    assert len(found) == 3


def test_what_cannot_be_encoded_is_named(policy):
    encoder = PairEncoder.of(policy)
    even = Pair("q", id="e", responses=(Response("a", 1.0), Response("b", 1.0)))
    with pytest.raises(
        ValueError, match="pair 'e': all its responses have the same score, so there is nothing to prefer"
    ):
        encoder(even, None)
    pair = Pair("q", id="l", responses=(Response("a", 1.0), Response("b" * 9, 2.0), Response("c" * 30, 3.0)))
    longest = len(encoder(pair, None).sample.prompt) + 31
    PairEncoder.of(policy, max_tokens=longest)(pair, None)
    with pytest.raises(PairTooLong, match=f"pair 'l' needs {longest} tokens"):
        PairEncoder.of(policy, max_tokens=longest - 1)(pair, None)
    compared = compare_responses(pair, "best_worst")
    assert [len(response) for response in encoder(compared, None).sample.responses] == [31, 2]


def test_a_message_lists_the_tokens_of_every_response():
    assert tokens_of(row()) == "31 tokens: prompt 20; responses 4, 3, 2 and 6"
    assert tokens_of(EncodedPair(Sample(PROMPT, RESPONSES[:2]), "a")).endswith("responses 4 and 3")
    assert tokens_of(EncodedPair(Sample(PROMPT, RESPONSES[:1]), "a", ())).endswith("responses 4")
