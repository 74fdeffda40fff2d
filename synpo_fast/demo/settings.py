"""Sizes and options of the demo, and the folder that belongs to one choice of them.

All was chosen on worlds of other seeds than those whose results are published.
Warm-up: with steps of 8 captions the model had not learned to see sizes on four seeds of six, with 16 on one of eight.
Preferences about what it does not see make it guess with more confidence, and the NLL of the truth can rise.
SynPO: alpha = 10 and beta = 1 instead of 30 and 0.2, because captions of twenty tokens differ more in their mean
probability than captions of two hundred, and alpha = 30 would saturate at once. At a rate of 1e-3 it guessed with more
confidence than at 5e-4.
DPO: of six pairs of rate and beta the one with the best accuracy, which had the best NLL too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synpo_fast.demo.evaluate import MAX_NEW_TOKENS, SAMPLING, VIDEO_BACKEND
from synpo_fast.run_folder.superseded import free_name

FILE = "demo_settings.json"
PARTS = ("data", "base", "base.partial", "warm_up", "synpo", "dpo")  # of the output folder
RESULTS = ("demo.json", "report.html")


@dataclass(frozen=True)
class Settings:
    """All that decides a demo's result."""

    seed: int
    num_train: int = 1200
    num_unseen: int = 100
    warm_up: dict[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 480, "per_device_train_batch_size": 16, "learning_rate": 1.5e-3, "adam_beta2": 0.98
        }
    )  # fmt: skip
    synpo: dict[str, Any] = field(
        default_factory=lambda: {"max_steps": 100, "learning_rate": 5e-4, "alpha": 10.0, "beta": 1.0}
    )
    dpo: dict[str, Any] = field(default_factory=lambda: {"max_steps": 100, "learning_rate": 1.5e-4, "beta": 0.3})
    profile_rounds: int = 10
    pairs_per_step: int = 16
    lora_r: int = 16
    lora_alpha: int = 32


def quick_settings(seed: int) -> Settings:
    """Every step in small: to see that all works, not what it is good for."""
    few = {"max_steps": 4, "learning_rate": 1e-3}
    return Settings(
        seed,
        num_train=32,
        num_unseen=8,
        warm_up=few,
        synpo=few,
        dpo={**few, "beta": 0.1},
        profile_rounds=1,
        pairs_per_step=8,
    )


def prepare_folder(out: Path, settings: Settings) -> None:
    """Makes the folder. Results of other settings are moved aside; ValueError for a folder that is not a demo's."""
    text = json.dumps(asdict(settings), indent=1)
    file = out / FILE
    if out.exists() and not file.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty and not a folder of the demo: give another one")
    if file.exists() and file.read_text(encoding="utf-8") != text:
        earlier = free_name(out / "earlier")
        earlier.mkdir()
        for part in (*PARTS, *RESULTS, FILE):
            if (out / part).exists():
                (out / part).rename(earlier / part)
        print(f"{out} holds a demo with other settings: that one is now in {earlier.name}/", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def warm_up_options(out: Path, settings: Settings) -> dict[str, Any]:
    return {
        **_common_options(out, settings),
        "model_name_or_path": out / "base",
        "train_file": out / "data" / "warm_up.jsonl",
        "use_peft": False,
        "freeze_vision": False,
        **settings.warm_up,
    }


def preference_options(out: Path, settings: Settings, model: Path, own: dict[str, Any]) -> dict[str, Any]:
    return {
        **_common_options(out, settings),
        "model_name_or_path": model,
        "train_file": out / "data" / "pairs.jsonl",
        "lora_r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": 0.0,
        **own,
    }


def _common_options(out: Path, settings: Settings) -> dict[str, Any]:
    return {
        "eval_file": out / "data" / "held_out.jsonl",
        "fps": SAMPLING.fps,
        "min_frames": SAMPLING.min_frames,
        "max_frames": SAMPLING.max_frames,
        "video_backend": VIDEO_BACKEND,
        "per_device_train_batch_size": settings.pairs_per_step,
        "per_device_eval_batch_size": settings.pairs_per_step,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "max_new_tokens": MAX_NEW_TOKENS,
        "dataloader_num_workers": 1,
        "save_total_limit": 1,
        "seed": settings.seed,
        "disable_tqdm": True,
    }
