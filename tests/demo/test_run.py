"""The demo from beginning to end in small, its folder, and what it tells."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from synpo_fast.cli import main
from synpo_fast.config.sources import resolve_config
from synpo_fast.demo.dataset import read_unseen
from synpo_fast.demo.evaluate import encode_clips, load_trained
from synpo_fast.demo.settings import Settings, preference_options, prepare_folder, quick_settings, warm_up_options
from synpo_fast.demo.summary import TRAININGS, summary
from tests.demo.test_model import plain_captions


@pytest.mark.parametrize("settings", [Settings(0), quick_settings(0)], ids=["full", "quick"])
def test_the_trainer_knows_every_option(settings, tmp_path):
    trainings = {
        "sft": warm_up_options(tmp_path, settings),
        "synpo": preference_options(tmp_path, settings, tmp_path, settings.synpo),
        "dpo": preference_options(tmp_path, settings, tmp_path, settings.dpo),
    }
    configs = {}
    for recipe, options in trainings.items():
        words = [word for name, value in options.items() for word in (f"--{name}", run_text(value))]
        configs[recipe] = resolve_config(["--recipe", recipe, "--output_dir", str(tmp_path), *words])
        assert configs[recipe].loss_type == recipe and not configs[recipe].use_cpu
    # The same pairs, steps and adapter for both.
    for name in (
        "train_file",
        "max_steps",
        "per_device_train_batch_size",
        "lora_r",
        "lora_alpha",
        "share_prefix",
        "seed",
    ):
        assert getattr(configs["synpo"], name) == getattr(configs["dpo"], name)


def run_text(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_a_folder_of_something_else_is_not_touched(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert main(["demo", "--out", str(tmp_path), "--quick"]) == 2
    assert "not empty and is not a folder of the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_other_settings_start_anew_and_equal_ones_keep_what_is_there(tmp_path):
    settings = quick_settings(1)
    prepare_folder(tmp_path, settings)
    (tmp_path / "data").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prepare_folder(tmp_path, settings)
    assert (tmp_path / "data").exists()
    (tmp_path / "data" / "results").write_text("hours")
    (tmp_path / "demo.json").write_text("{}")
    for seed, name in ((2, "earlier"), (3, "earlier.2")):
        prepare_folder(tmp_path, replace(settings, seed=seed))
        assert not (tmp_path / "data").exists() and (tmp_path / "notes.txt").exists()
        assert (tmp_path / name).is_dir()
    assert (tmp_path / "earlier" / "data" / "results").read_text() == "hours"
    assert (tmp_path / "earlier" / "demo.json").exists() and not (tmp_path / "demo.json").exists()


def test_the_summary_shows_all_three_whatever_the_outcome():
    shares = {"count": 0.5, "order": 1.0}
    results = {
        "accuracy": {"warm_up": 0.61, "synpo": 0.5, "dpo": 0.9},
        "per_attribute": dict.fromkeys(TRAININGS, shares),
        "nll": {"warm_up": 0.2, "synpo": 0.25, "dpo": 0.3},
        "step": {
            "synpo": {"seconds": {"median": 0.2}, "skipped": None},
            "dpo-adapter-off": {"seconds": {"median": 0.25}, "skipped": None},
            "dpo-precomputed": {"seconds": {"median": 0.1}, "skipped": None},
            "dpo-adapter-off-unshared": {"seconds": None, "skipped": "no room"},
        },
        "seconds": {"data": 1.0, "dpo": 2.0},
        "examples": [{"video": "v.webm", "truth": "a", "before": "b", "after": "c", "dpo": "d"}],
    }
    text = summary(results)
    for expected in ("61.0", "50.0", "90.0", "0.200", "0.300", "200 ms", "1.25 times", "0.50 times", "v.webm"):
        assert expected in text
    assert "prompt run once per caption" not in text, "it was not measured"


@pytest.mark.heavy
def test_the_whole_demo_in_small(tmp_path):
    """Through the launcher; run again it does nothing twice; and what it saved, plain transformers and peft decode alike."""
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "synpo_fast.cli", "demo", "--quick", "--out", str(out), "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "report.html" in first.stdout and (out / "report.html").exists()
    results = json.loads((out / "demo.json").read_text())
    assert set(results["accuracy"]) == set(results["nll"]) == set(results["per_attribute"]) == set(TRAININGS)
    assert results["step"]["synpo"]["seconds"]["median"] > 0 and "times as long" in first.stdout
    assert len(results["examples"]) == 8 and all((out / row["video"]).exists() for row in results["examples"])

    again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert again.returncode == 0 and again.stdout.count("already done") == 4
    repeated = json.loads((out / "demo.json").read_text())
    assert repeated["examples"] == results["examples"] and repeated["nll"] == results["nll"]

    settings = quick_settings(3)
    base, adapter = out / "warm_up" / "checkpoint-000004", out / "synpo" / "checkpoint-000004"
    policy = load_trained(base, adapter, lora_r=settings.lora_r, lora_alpha=settings.lora_alpha)
    samples = encode_clips(policy, read_unseen(out / "data"), out / "data")
    captions = plain_captions(base, adapter, samples, tmp_path, max_new_tokens=48)
    assert captions == [row["after"] for row in results["examples"]]
