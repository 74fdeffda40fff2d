"""`synpo-fast demo`: from nothing to a model trained with SynPO, beside DPO from the same start, in a few minutes on a CPU.

    data       videos of a synthetic world, captions and preference pairs with known errors
    warm-up    a small Qwen2.5-VL learns to caption from the careless captioner, its habits included
    SynPO      LoRA on its language model, through the deepspeed launcher
    DPO        the same pairs, steps and adapter, from the same warm-up
    speed      steps of both in turn, on the same pairs with the same engine
    evaluation captions of unseen videos, attribute by attribute, and the NLL of the truth
    report     demo.json and report.html

Each step is left out if an earlier run in the same folder, with the same settings, has done it.
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

if TYPE_CHECKING:  # it loads torch, which --help can do without
    from synpo_fast.demo.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 1: a step failed. 2: a mistake in the call. 130: interrupted."""
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
        print("\nsynpo-fast demo: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="synpo-fast demo",
        description="Train a tiny video-language model with SynPO, beside DPO, in a few minutes.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("synpo_fast_demo"), help="folder for all it writes (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the videos, the captions and the model (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    return parser


def run_demo(out: Path, settings: Settings) -> dict[str, Any]:
    """Runs what is not done yet; returns what demo.json holds."""
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
            out / "data", seed=settings.seed, num_train=settings.num_train, num_unseen=settings.num_unseen, say=_videos
        )
        if not (out / "base").exists():
            save_model(out / "base.partial", settings.seed)
            (out / "base.partial").rename(out / "base")
    with clock.step("warm_up", "warm-up: a small Qwen2.5-VL learns from careless captions"):
        print("  (on a CPU the first training on a machine compiles a part of DeepSpeed, about 30 s)", flush=True)
        model = train(out / "warm_up", "sft", warm_up_options(out, settings))
    with clock.step("synpo", "SynPO: LoRA on the language model, no reference"):
        synpo = train(out / "synpo", "synpo", preference_options(out, settings, model, settings.synpo))
    with clock.step("dpo", "DPO: the same pairs, steps and adapter; reference: the adapter switched off"):
        dpo = train(out / "dpo", "dpo", preference_options(out, settings, model, settings.dpo))
    with clock.step("speed", "speed: steps of SynPO and DPO in turn, on the same pairs"):
        options = preference_options(out, settings, model, settings.synpo)
        speed = profile(out / "synpo", "synpo", options, settings.profile_rounds)
    with clock.step("evaluation", f"captions of {settings.num_unseen} unseen videos, by each of the three"):
        results = evaluate_all(out, settings, model, {"warm_up": None, "synpo": synpo, "dpo": dpo})
    results["seconds"] = clock.seconds
    variants = speed["variants"] if "variants" in speed else speed["ways"]  # as an earlier release called them
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
    """No bars for loading a file of some megabytes, and no warning of deepspeed, which transformers imports, about the device."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from transformers.utils import logging

    logging.disable_progress_bar()


def evaluate_all(out: Path, settings: Settings, model: Path, adapters: dict[str, Path | None]) -> dict[str, Any]:
    from synpo_fast.demo.dataset import read_unseen
    from synpo_fast.demo.evaluate import encode_clips, evaluate, load_trained

    clips = read_unseen(out / "data")
    samples, found = None, {}
    for name, adapter in adapters.items():
        policy = load_trained(model, adapter, lora_r=settings.lora_r, lora_alpha=settings.lora_alpha)
        samples = samples or encode_clips(policy, clips, out / "data")
        found[name] = evaluate(policy, clips, samples)
        print(f"  {name}: {100 * found[name].accuracy.overall:.1f} % of the attributes", flush=True)
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
    """Says what begins, and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        print(f"\n{len(self.seconds) + 1}. {title}", flush=True)
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 1)
        print(f"  {self.seconds[name]:.0f} s", flush=True)


def _videos(done: int, every: int) -> None:
    print(f"  {done}/{every} videos", flush=True)
