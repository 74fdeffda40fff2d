"""A small folder of videos, a manifest of pairs and a tiny model, for tests that train."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from synpo_fast.data import Pair, read_manifest, write_manifest
from synpo_fast.models import load_policy
from synpo_fast.testing.clips import write_clip

ROOT = Path(__file__).resolve().parent.parent
COLOURS = ("red", "green", "blue", "white")


def make_world(folder: Path, *, num_videos: int = 8) -> Path:
    """Writes videos, pairs.jsonl (two pairs per video) and base/, a tiny model saved by transformers."""
    pairs = []
    for index in range(num_videos):
        write_clip(folder / f"v{index}.mp4", codec="h264", num_frames=8 + index, width=64, height=64, fps=8)
        for half, colour in enumerate(("left", "right")):
            pairs.append(
                Pair(
                    f"What moves {colour}?",
                    f"A {COLOURS[index % 4]} square of size {index}.",
                    f"A circle{'s' * half} number {index}.",
                    video=f"v{index}.mp4",
                    id=f"p{index}-{half}",
                    ground_truth=f"Truth {index}.",
                )
            )
    write_manifest(folder / "pairs.jsonl", pairs)
    policy = load_policy("tiny:qwen2_5_vl", seed=3)
    policy.model.save_pretrained(str(folder / "base"))
    policy.tokenizer.save_pretrained(str(folder / "base"))
    return folder


def with_gaps(manifest: Path, copy: Path) -> None:
    """Copies a manifest; every third pair gets a video that does not exist."""
    pairs = list(read_manifest(manifest))
    pairs[::3] = [replace(pair, video="gone.mp4") for pair in pairs[::3]]
    write_manifest(copy, pairs)


def options(world: Path, output_dir: Path, **more: Any) -> dict[str, Any]:
    """The options of a run of 6 steps of 4 pairs on one process."""
    return {
        "model_name_or_path": str(world / "base"),
        "train_file": str(world / "pairs.jsonl"),
        "output_dir": str(output_dir),
        "num_frames": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.3,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "weight_decay": 1.0,
        "max_grad_norm": 0.02,
        "save_steps": 3,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "zero_stage": 2,
        **more,
    }


def command_line(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", _text(value))]


def environment() -> dict[str, str]:
    """The environment of a training process: this checkout, one thread, no variables of a launcher around the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def run(words: list[str], *, timeout: float = 300, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), **more)


def train_command(values: dict[str, Any], *, num_ranks: int = 1, port: int = 0) -> list[str]:
    """The command as a user types it: by path under the deepspeed launcher, or as a module in one process."""
    if num_ranks == 1:
        return [sys.executable, "-m", "synpo_fast.train", *command_line(values)]
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        str(num_ranks),
        "--master_port",
        str(port),
    ]
    return [*launcher, str(ROOT / "synpo_fast" / "train.py"), *command_line(values)]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)
