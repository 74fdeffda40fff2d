"""The default ZeRO stage: the bytes it sends, that a run stores it, and that a run of the earlier default resumes."""

import json
import socket
import sys
from pathlib import Path

import pytest
import yaml

from synpo_fast.config.sources import dump_config, resolve_config
from synpo_fast.training.metrics import read_metrics
from tests.world import ROOT, options, run

NUMBERS = 64 * 64  # trained, in count_bytes.py
GRADIENTS = {"float32": 4 * NUMBERS, "bfloat16": 2 * NUMBERS}
# Weights a rank hands over after its part of the step, by stages 1 and 2; and the norm, an overflow flag, ...
SHARDS = {"float32": 2 * NUMBERS, "bfloat16": NUMBERS}
SMALL = 64


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """The bytes that one of two ranks passes to collectives in a step, by stage, type and number of micro-batches."""
    file = tmp_path_factory.mktemp("bytes") / "sent.json"
    launcher = Path(sys.executable).parent / "deepspeed"
    script = str(ROOT / "tests" / "training" / "count_bytes.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = run([str(launcher), "--num_gpus", "2", "--master_port", port, script, str(file)], cwd=file.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {case: num_bytes for case, (num_bytes, _) in json.loads(file.read_text()).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stage_1_reduces_gradients_once_a_step_and_stage_2_after_every_micro_batch(sent, dtype):
    for micros in (1, 6):
        once = sent[f"1/{dtype}/{micros}"] - GRADIENTS[dtype] - SHARDS[dtype]
        every = sent[f"2/{dtype}/{micros}"] - micros * GRADIENTS[dtype] - SHARDS[dtype]
        assert 0 <= once <= SMALL and 0 <= every <= SMALL, (micros, once, every)


def test_stage_0_reduces_once_and_stage_3_after_every_micro_batch(sent):
    assert sent["0/float32/1"] == sent["0/float32/6"] == GRADIENTS["float32"]
    assert sent["3/float32/6"] >= 6 * GRADIENTS["float32"]


def test_an_adapter_reduces_once_a_step_unless_told_otherwise(sent):
    assert sent["adapter/float32/6"] == sent["adapter/float32/1"] == sent["1/float32/6"]
    assert sent["full/float32/6"] == sent["2/float32/6"]


@pytest.mark.parametrize(("more", "stage"), [([], 1), (["--use_peft", "false"], 2), (["--zero_stage", "2"], 2)])
def test_the_stage_is_resolved_once_and_kept(more, stage, tmp_path):
    config = resolve_config(["--model_name_or_path", "x", "--train_file", "x", "--output_dir", "x", *more])
    assert config.zero_stage == stage
    text = dump_config(config)
    assert yaml.safe_load(text)["zero_stage"] == stage
    (tmp_path / "config.yaml").write_text(text)
    assert resolve_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_run_of_the_earlier_default_goes_on_with_the_new_one(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "a", report=False)
    assert values.pop("zero_stage") == 2
    in_one_process({**values, "zero_stage": 2})
    half = str(tmp_path / "a" / "checkpoint-000003")
    in_one_process({**values, "output_dir": str(tmp_path / "b"), "resume": half})
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())["zero_stage"] == 1
    whole, part = ([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("a", "b"))
    assert part == pytest.approx(whole[3:], abs=2e-5)
