"""Run folders as the trainer leaves them, made without training, for tests of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synpo_fast.config.sources import dump_config
from synpo_fast.config.train_config import TrainConfig

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "some-package": "1.2.3+local"}


def step_row(step: int, num_steps: int) -> dict[str, Any]:
    """The numbers of one step: smooth, but for a wiggle."""
    done, wiggle = step / num_steps, 0.02 * math.sin(2.4 * step)
    return {
        "step": step,
        "loss": -0.5 - 0.3 * done + wiggle,
        "rewards/chosen": 0.3 + wiggle,
        "rewards/rejected": 0.3 - 0.2 * done + wiggle,
        "rewards/margins": 0.2 * done,
        "rewards/accuracies": 0.5 + 0.4 * done,
        "logps/chosen": -1.2 - wiggle,
        "logps/rejected": -1.3 - done,
        "nll_loss": 1.2 + wiggle,
        "grad_norm": 1 + 10 * wiggle,
        "learning_rate": 5e-6 * (1 - done),
        "epoch": done,
        "num_tokens": 1000 * step,
        "step_s": 2.0,
        "data_wait_share": 0.01,
        "pairs_per_s": 16.0,
        "tokens_per_s": 500.0,
        "skipped_pairs": 0,
        "nonfinite_steps": 0,
    }


def captions(words: str, video: str | None = "v0.mp4") -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{number}",
            "video": video,
            "prompt": "What moves?",
            "caption": f"{words} {number}",
            "chosen": "A red square.",
            "rejected": "A blue circle.",
        }
        for number in range(2)
    ]


def write_rows(file: Path, rows: Sequence[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, *, num_steps: int = 12, rows: Sequence[Any] | None = None, **options: Any) -> Path:
    """A whole run. rows: of metrics.jsonl, in place of num_steps ordinary ones and two evaluations with captions."""
    folder.mkdir(parents=True)
    if rows is None:
        rows = [step_row(step, num_steps) for step in range(1, num_steps + 1)]
        for step, words in ((num_steps // 2, "halfway"), (num_steps, "finally")):
            row = {"step": step, "eval_loss": -0.6, "eval_rewards/accuracies": 0.75, "eval_captions": captions(words)}
            rows.append(row)
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(
        folder / "skipped_pairs.rank0.jsonl", [{"id": "bad-7", "reason": "lost.mp4: there is no such file", "epoch": 0}]
    )
    settings = {"model_name_or_path": "tiny:qwen2_5_vl", "train_file": str(folder / "pairs.jsonl"), **options}
    config = TrainConfig(output_dir=str(folder), **settings)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    state = folder / f"checkpoint-{num_steps:06d}" / "state"
    state.mkdir(parents=True)
    trainer = {"state": {"step": num_steps, "stopped_early": False}, "facts": {}, "versions": VERSIONS}
    (state / "trainer.json").write_text(json.dumps(trainer), encoding="utf-8")
    return folder


def spread_of(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.2 * median}


def profile() -> dict[str, Any]:
    stages = {
        "SynPO": {"vision": 1.0, "backward": 3.0},
        "DPO, adapter off": {"vision": 2.0, "reference": 2.0, "backward": 4.0},
    }
    variants = [
        {
            "name": name,
            "seconds": spread_of(sum(parts.values())),
            "peak_memory_bytes": 3 * 2**30,
            "flops": 2.5e15,
            "tokens_per_s": 1234.0,
            "ratio": spread_of(sum(parts.values()) / 4),
            "stages": {stage: spread_of(seconds) for stage, seconds in parts.items()},
        }
        for name, parts in stages.items()
    ]
    unset = {"seconds": None, "stages": None, "ratio": None, "tokens_per_s": None}
    variants.append({"name": "DPO, frozen copy", "skipped": "zero_stage=3 shards the model", **unset})
    variants[1]["amortised_s"] = 0.25
    return {
        "stages": variants[0]["stages"],
        "variants": variants,
        "rounds": 9,
        "batch": {"pairs": 2.0, "prompt_tokens": 1293.3, "response_tokens": 485.1},
        "limit": {"dpo_over_synpo_shared": 2.5908, "unshared": 1.5},
        "ratio_base": "DPO, adapter off",
        "environment": {"device": "a device"},
        "config": {"learning_rate": 0.25},
    }


def demo(video: str) -> dict[str, Any]:
    return {
        "accuracy": {"warm_up": 0.501, "synpo": 0.702, "dpo": 0.653},
        "nll": {"warm_up": 0.71, "synpo": 0.72, "dpo": 0.93},
        "per_attribute": {"colour": {"warm_up": 0.4, "synpo": 0.8, "dpo": 0.6}},
        "examples": [{"video": video, "truth": "a red square", "before": "a blue square", "after": "a red square"}],
        "seconds": {"data": 3.0},
        "pairs_per_s": {"synpo": 12.5, "dpo": 10.0},
    }
