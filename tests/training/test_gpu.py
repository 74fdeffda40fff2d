"""The trainer on a GPU, as a user starts it. Nothing here runs without one; `benchmarks/gpu_check.sh OUT trainer` runs it."""

import json

import pytest

from synpo_fast.data.video.decode import available_backends
from synpo_fast.training.metrics import read_metrics
from tests.world import options, run, train_command

pytestmark = pytest.mark.gpu
BF16 = 0.05  # of a loss near 1; weights of the tiny model move by less than that in 6 steps


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def trained(world, folder, **more):
    values = {**options(world, folder, report=False), "use_cpu": False, **more}
    done = run(train_command(values))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return losses(folder)


@pytest.fixture(scope="module")
def on_the_cpu(world, tmp_path_factory):
    """The fp32 run with which every run on the GPU is compared."""
    return trained(world, tmp_path_factory.mktemp("cpu") / "out", use_cpu=True)


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": False, "zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 2, "fp16": True, "bf16": False},
        {"zero_stage": 2, "gradient_checkpointing": True},
        {"zero_stage": 2, "attn_implementation": "sdpa"},
        {"zero_stage": 2, "liger_kernels": True},
    ],
    ids=lambda more: "-".join(f"{name}={value}" for name, value in more.items()),
)
def test_losses_are_those_of_the_cpu(world, tmp_path, on_the_cpu, more):
    found = trained(world, tmp_path / "out", **more)
    assert len(found) == 6 and found == pytest.approx(on_the_cpu, abs=2e-3 if more.get("bf16") is False else BF16)


def test_a_full_model_in_bf16_with_a_frozen_copy(world, tmp_path):
    more = {"use_peft": False, "loss_type": "dpo", "reference": "frozen_copy", "learning_rate": 1e-4}
    on_cpu = trained(world, tmp_path / "cpu", use_cpu=True, **more)
    assert trained(world, tmp_path / "gpu", **more) == pytest.approx(on_cpu, abs=BF16)


def test_a_resumed_run_goes_on(world, tmp_path):
    whole = trained(world, tmp_path / "whole")
    trained(world, tmp_path / "part", max_steps=3)
    assert trained(world, tmp_path / "part", resume="auto") == pytest.approx(whole, abs=BF16)


@pytest.mark.parametrize("backend", ["pyav", "dali"])
def test_videos_decoded_for_the_gpu_in_a_thread(world, tmp_path, on_the_cpu, backend):
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed")
    more = {"video_device": "cuda", "video_backend": backend}
    assert trained(world, tmp_path / "out", **more) == pytest.approx(on_the_cpu, abs=BF16)


def test_a_profile(world, tmp_path):
    values = {**options(world, tmp_path / "out"), "use_cpu": False, "profile": 3}
    done = run(train_command(values))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    variants = json.loads((tmp_path / "out" / "profile.json").read_text())["variants"]
    for variant in variants:
        assert variant["skipped"] is None and variant["peak_memory_bytes"] > 0 and variant["flops"] > 0
        assert variant["stages_over_step"]["median"] == pytest.approx(1.0, abs=0.05)
