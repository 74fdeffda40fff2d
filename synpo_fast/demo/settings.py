"""The demo's sizes and options, and its output folder, which belongs to one set of them.

All values were chosen on other seeds than those whose results are published.
Warm-up: with 8 captions per step the model had not learned to see sizes on four of six seeds, with 16 on one of eight.
Preferences about attributes that the model does not see make it guess with more confidence; the NLL of true captions can rise.
SynPO: alpha = 10 and beta = 1 instead of 30 and 0.2, because captions of twenty tokens differ more in their mean probability than
captions of two hundred, so alpha = 30 would saturate at once. With a learning rate of 1e-3 the model guessed with more confidence
than with 5e-4.
DPO: of six pairs of learning rate and beta, this one had the best accuracy and the best NLL.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synpo_fast.demo.evaluate import MAX_NEW_TOKENS, SAMPLING, VIDEO_BACKEND
from synpo_fast.run_folder.superseded import free_name

FILE = "demo_settings.json"
PARTS = ("data", "base", "base.partial", "warm_up", "synpo", "dpo")  # in the output folder
RESULTS = ("demo.json", "report.html")


@dataclass(frozen=True)
class Settings:
    """All settings that determine a demo's result."""

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
    """Settings for a short run that checks that every step works; its results mean nothing."""
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
    """Makes the output folder. Moves results of other settings to a subfolder. ValueError if the folder is not a demo's."""
    text = json.dumps(asdict(settings), indent=1)
    file = out / FILE
    if out.exists() and not file.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty and is not a folder of the demo: name another folder")
    if file.exists() and file.read_text(encoding="utf-8") != text:
        earlier = free_name(out / "earlier")
        earlier.mkdir()
        for part in (*PARTS, *RESULTS, FILE):
            if (out / part).exists():
                (out / part).rename(earlier / part)
        print(f"{out} held a demo with other settings, which was moved to {earlier.name}/", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def warm_up_options(out: Path, settings: Settings) -> dict[str, Any]:
    """The trainer's options for the warm-up."""
    return {
        **_common_options(out, settings),
        "model_name_or_path": out / "base",
        "train_file": out / "data" / "warm_up.jsonl",
        "use_peft": False,
        "freeze_vision": False,
        **settings.warm_up,
    }


def preference_options(out: Path, settings: Settings, model: Path, own: dict[str, Any]) -> dict[str, Any]:
    """The trainer's options for SynPO or DPO, starting from `model`. own: the options in which the two differ."""
    return {
        **_common_options(out, settings),
        "model_name_or_path": model,
        "train_file": out / "data" / "pairs.jsonl",
        "pairs_from": "best_rest",  # a comparison of two careless captions would raise the probability of a habit
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
