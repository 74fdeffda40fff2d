"""A row with several responses: it trains as its comparisons would as separate rows, and runs each response once."""

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.loader import StepBatch
from synpo_fast.models import load_policy
from synpo_fast.models.policy import Sample
from synpo_fast.references import FrozenCopy
from synpo_fast.training.metrics import add_sums, means_of
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.reward_gradients import reward_gradient_norms
from synpo_fast.training.step import Stepper

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
