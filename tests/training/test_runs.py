"""Whole runs through the real launcher: the same losses and weights for every stage and number of ranks, and after a resume.

The truth is eager.py. Tolerances are for fp32, whose sums come in another order on two ranks.
"""

import itertools
import json
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.training.metrics import read_metrics
from tests.training.eager import eager_run
from tests.world import ROOT, options, run, with_gaps

STAGES = (0, 1, 2, 3)
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 5e-5  # weights move by about 1e-3 a step


def losses_of(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def norms_of(folder):
    return [row["grad_norm"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def weights_of(checkpoint, use_peft):
    file = checkpoint / ("adapter_model.safetensors" if use_peft else "model.safetensors")
    return load_file(file)


def assert_same_weights(found, expected, tolerance):
    assert set(found) == set(expected) and found
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def launch(values, tmp_path, num_ranks, port, timeout=580):
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(values))
    script = [str(ROOT / "tests" / "training" / "many_runs.py"), str(file)]
    launcher = [sys.executable.replace("python", "deepspeed").rsplit("/", 1)[0] + "/deepspeed"]
    head = [*launcher, "--num_gpus", str(num_ranks), "--master_port", str(port)] if num_ranks > 1 else [sys.executable]
    done = run([*head, *script], timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
def test_stages_ranks_and_resumes_agree_with_the_eager_run(world, tmp_path, port, use_peft):
    """Each stage on two ranks; then each of them resumed half-way, in another stage, on one rank and on two."""
    more = {"use_peft": use_peft, "learning_rate": 1e-3 if use_peft else 3e-4}

    def values(name, **extra):
        return options(world, tmp_path / name, **more, **extra)

    two = {"gradient_accumulation_steps": 2}  # on 2 ranks: the same 4 pairs a step
    first = [values(f"two-{stage}", zero_stage=stage, **two) for stage in STAGES]
    # Resumed on two ranks, each in the next stage; the run before it saved at step 3 and at the end.
    half = {stage: str(tmp_path / f"two-{stage}" / "checkpoint-000003") for stage in STAGES}
    moved = [values(f"moved-{s}", zero_stage=(s + 1) % 4, resume=half[s], **two) for s in STAGES]
    launch([*first, *moved], tmp_path, 2, port)
    one = [values("one", zero_stage=0), *(values(f"single-{s}", zero_stage=s, resume=half[s]) for s in STAGES)]
    launch(one, tmp_path, 1, port)

    losses, weights, norms = eager_run(values("one"))
    assert min(norms) > 0.02  # every step is clipped, and the norm before it tells the scale of the gradient
    reference = weights_of(tmp_path / "one" / "checkpoint-000006", use_peft)
    names = ["one", *(f"{kind}-{stage}" for kind, stage in itertools.product(("two", "moved", "single"), STAGES))]
    for name in names:
        resumed = name.startswith(("moved", "single"))
        assert losses_of(tmp_path / name) == pytest.approx(losses[3:] if resumed else losses, abs=LOSS_TOLERANCE), name
        assert norms_of(tmp_path / name) == pytest.approx(norms[3:] if resumed else norms, rel=2e-3), name
        found = weights_of(tmp_path / name / "checkpoint-000006", use_peft)
        assert_same_weights(found, reference, WEIGHT_TOLERANCE)
    # The weights of a run against the eager ones: names differ, so by value.
    moved_most = 0.0
    for name, value in weights.items():
        stem = name.removeprefix("model.").replace(".default", "")
        (match,) = [key for key in reference if key.endswith(stem) or stem.endswith(key)] or [None]
        assert match is not None, (name, sorted(reference)[:4])
        torch.testing.assert_close(reference[match], value, rtol=0, atol=WEIGHT_TOLERANCE)
        moved_most = max(moved_most, float(value.abs().max()))
    assert moved_most > 1e-3


@pytest.mark.parametrize("loss_type", ["synpo", "dpo"])
def test_ranks_that_have_unequal_numbers_of_pairs_take_the_same_steps_sharded(world, tmp_path, port, loss_type):
    """With a missing video one rank has a pair less, and fewer responses; under ZeRO-3 all ranks must gather weights together."""
    with_gaps(world / "pairs.jsonl", tmp_path / "pairs.jsonl")
    more = {"loss_type": loss_type, "train_file": str(tmp_path / "pairs.jsonl"), "video_root": str(world)}
    more |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_bad_share": 1.0}
    stages = (0, 3)
    values = [options(world, tmp_path / f"stage-{stage}", zero_stage=stage, **more) for stage in stages]
    launch(values, tmp_path, 2, port, timeout=150)

    def missing_by_step(folder, rank):
        lines = (folder / f"skipped_pairs.rank{rank}.jsonl").read_text().splitlines()
        return Counter(json.loads(line)["step"] for line in lines)

    plain, sharded = (tmp_path / f"stage-{stage}" for stage in stages)
    assert missing_by_step(sharded, 0) != missing_by_step(sharded, 1), "ranks are unequal in some step"
    assert losses_of(sharded) == pytest.approx(losses_of(plain), abs=LOSS_TOLERANCE)
    ends = [weights_of(folder / "checkpoint-000006", True) for folder in (plain, sharded)]
    assert_same_weights(*ends, tolerance=WEIGHT_TOLERANCE)


def test_two_ranks_equal_an_uninterrupted_run_bit_for_bit_after_a_resume(world, tmp_path, port):
    """With the same stage and ranks, and dropout on, the resumed run is bit for bit equal."""
    more = {"gradient_accumulation_steps": 2, "lora_dropout": 0.3, "zero_stage": 2}
    whole = options(world, tmp_path / "whole", **more)
    part = options(world, tmp_path / "part", **more, resume=str(tmp_path / "whole" / "checkpoint-000003"))
    launch([whole, part], tmp_path, 2, port)
    assert losses_of(tmp_path / "whole")[3:] == losses_of(tmp_path / "part")
    ends = [weights_of(tmp_path / name / "checkpoint-000006", True) for name in ("whole", "part")]
    assert_same_weights(*ends, tolerance=0)


@pytest.mark.parametrize("kind", ["synpo", "dpo-adapter_off", "dpo-frozen_copy", "dpo-precomputed", "sft"])
def test_the_first_ten_losses_are_those_of_the_eager_computation(world, tmp_path, kind, in_one_process):
    loss, _, reference = kind.partition("-")
    values = options(world, tmp_path / "out", loss_type=loss, max_steps=10)
    in_one_process({**values, **({"reference": reference} if reference else {})})
    losses, _, norms = eager_run(values)
    assert losses_of(tmp_path / "out") == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert norms_of(tmp_path / "out") == pytest.approx(norms, rel=2e-3)
    assert max(losses) - min(losses) > 1e-3  # it trains


@pytest.mark.parametrize(
    "more",
    [
        {"loss_type": "dpo,bco_pair,sft", "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": "dpo", "ld_alpha": 0.25, "reference": "precomputed"},
        {"loss_type": "dpo", "use_weighting": True},
    ],
    ids=["mpo", "ld_alpha", "wpo"],
)
def test_a_sum_of_losses_and_ld_alpha_and_wpo_train_as_the_eager_computation(world, tmp_path, more, in_one_process):
    values = options(world, tmp_path / "out", max_steps=4, **more)
    in_one_process({**values, "loss_weights": tuple(more["loss_weights"]) if "loss_weights" in more else None})
    losses, _, norms = eager_run(values)
    assert losses_of(tmp_path / "out") == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert norms_of(tmp_path / "out") == pytest.approx(norms, rel=2e-3)
    if "loss_weights" not in more:
        return
    part = {**values, "output_dir": str(tmp_path / "part"), "resume": str(tmp_path / "out" / "checkpoint-000003")}
    in_one_process({**part, "loss_weights": tuple(more["loss_weights"])})  # the stored options are equal to these
    assert losses_of(tmp_path / "part") == losses_of(tmp_path / "out")[3:]
    for row in read_metrics(tmp_path / "out" / "metrics.jsonl"):
        parts = [
            w * row[f"loss/{name}"] for w, name in zip(more["loss_weights"], ("dpo", "bco_pair", "sft"), strict=True)
        ]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert row["loss/sft"] != pytest.approx(row["nll_loss"], rel=1e-6)  # the mean over pairs, not over tokens
