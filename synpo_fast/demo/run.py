"""`synpo-fast demo`: trains a tiny model with SynPO, and with DPO for comparison, from scratch in a few minutes on a CPU.

    data       makes synthetic videos, captions, and preference pairs with known errors
    warm-up    trains a small Qwen2.5-VL on the careless captioner's captions, so that it learns their systematic errors
    SynPO      trains LoRA on its language model, through the deepspeed launcher
    DPO        trains on the same pairs, for the same number of steps, with the same adapter, from the same warm-up
    speed      times steps of both in turn, on the same pairs with the same engine
    evaluation captions unseen videos; measures the accuracy of each attribute and the NLL of the true captions
    report     writes demo.json and report.html

A step is skipped if an earlier run in the same folder, with the same settings, has completed it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synpo_fast.demo.summary import TRAININGS, summary
from synpo_fast.terminal.printable import printable

if TYPE_CHECKING:  # importing it loads torch, which would slow --help
    from synpo_fast.demo.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Exit status: 0 if it is done, 1 if a step failed, 2 for a wrong call, 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    from synpo_fast.demo.launch import DemoError
    from synpo_fast.demo.settings import Settings, quick_settings

    settings = quick_settings(arguments.seed) if arguments.quick else Settings(arguments.seed)
    try:
        run_demo(arguments.out.resolve(), settings)
    except ValueError as error:
        print(f"synpo-fast demo: error: {printable(error)}", file=sys.stderr)
        return 2
    except DemoError as error:
        print(f"synpo-fast demo: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsynpo-fast demo: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synpo-fast demo",
        description="Train a tiny video-language model with SynPO, and with DPO for comparison, in a few minutes.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("synpo_fast_demo"), help="folder for all files that it writes (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of videos, captions and model (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="only a few steps of each training, to check that everything works"
    )
    return parser


def run_demo(out: Path, settings: Settings) -> dict[str, Any]:
    """Runs the steps that are not done yet. Returns the content of demo.json."""
    from synpo_fast.demo.dataset import make_dataset
    from synpo_fast.demo.launch import profile, train
    from synpo_fast.demo.model import save_model
    from synpo_fast.demo.settings import preference_options, prepare_folder, warm_up_options
    from synpo_fast.report.write import write_report

    prepare_folder(out, settings)
    _quiet()
    clock = Clock()
    with clock.step("data", f"drawing {settings.num_train + settings.num_unseen} videos"):
        make_dataset(
            out / "data",
            seed=settings.seed,
            num_train=settings.num_train,
            num_unseen=settings.num_unseen,
            on_progress=_print_progress,
        )
        if not (out / "base").exists():
            save_model(out / "base.partial", settings.seed)
            (out / "base.partial").rename(out / "base")
    with clock.step("warm_up", "warm-up: training a small Qwen2.5-VL on captions with systematic errors"):
        print(
            "  (on a CPU, the first training on a machine compiles a part of DeepSpeed, which takes about 30 s)",
            flush=True,
        )
        model = train(out / "warm_up", "sft", warm_up_options(out, settings))
    with clock.step("synpo", "SynPO: training LoRA on the language model, without a reference"):
        synpo = train(out / "synpo", "synpo", preference_options(out, settings, model, settings.synpo))
    with clock.step(
        "dpo",
        "DPO: training on the same pairs and with the same adapter; the reference is the model without its adapter",
    ):
        dpo = train(out / "dpo", "dpo", preference_options(out, settings, model, settings.dpo))
    with clock.step("speed", "speed: timing steps of SynPO and DPO in turn, on the same pairs"):
        options = preference_options(out, settings, model, settings.synpo)
        speed = profile(out / "synpo", "synpo", options, settings.profile_rounds)
    with clock.step(
        "evaluation", f"evaluation: captioning {settings.num_unseen} unseen videos with each of the three models"
    ):
        results = evaluate_all(out, settings, model, {"warm_up": None, "synpo": synpo, "dpo": dpo})
    results["seconds"] = clock.seconds
    variants = speed["variants"] if "variants" in speed else speed["ways"]  # "ways" in files of an earlier release
    results["step"] = {
        variant["name"]: {key: variant[key] for key in ("seconds", "ratio", "skipped")} for variant in variants
    }
    results["settings"] = asdict(settings)
    (out / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(summary(results), flush=True)
    print(f"\nresults: {out / 'demo.json'}", flush=True)
    print(f"report:  {write_report([out / name for name in TRAININGS], out / 'report.html')}", flush=True)
    return results


def _quiet() -> None:
    """Turns off transformers' progress bars, and DeepSpeed's warning about the device (transformers imports DeepSpeed)."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()


def evaluate_all(out: Path, settings: Settings, model: Path, adapters: dict[str, Path | None]) -> dict[str, Any]:
    """Evaluates the model with each adapter, and without one for None. Returns the results for demo.json."""
    from synpo_fast.demo.dataset import read_unseen
    from synpo_fast.demo.evaluate import encode_clips, evaluate, load_trained

    clips = read_unseen(out / "data")
    samples, found = None, {}
    for name, adapter in adapters.items():
        policy = load_trained(model, adapter, lora_r=settings.lora_r, lora_alpha=settings.lora_alpha)
        samples = samples or encode_clips(policy, clips, out / "data")
        found[name] = evaluate(policy, clips, samples)
        print(f"  {name}: {100 * found[name].accuracy.overall:.1f} % of the attributes correct", flush=True)
    return {
        "accuracy": {name: each.accuracy.overall for name, each in found.items()},
        "per_attribute": {name: each.accuracy.per_attribute() for name, each in found.items()},
        "nll": {name: each.nll for name, each in found.items()},
        "examples": [
            {"video": f"data/{clip.video}", "truth": clip.truth, "before": before, "after": after, "dpo": dpo}
            for clip, before, after, dpo in zip(clips, *(found[name].captions for name in TRAININGS), strict=True)
        ],
    }


class Clock:
    """Prints the title of each step of the demo, and records the seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        print(f"\n{len(self.seconds) + 1}. {title}", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)
        print(f"  {self.seconds[name]:.0f} s", flush=True)


def _print_progress(done: int, total: int) -> None:
    print(f"  {done}/{total} videos", flush=True)
