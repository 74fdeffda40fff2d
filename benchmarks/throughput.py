"""Measures a training step on pairs: DPO and SimPO in TRL, DPO with Liger, SynPO as released, and synpo_fast change by change.

    python benchmarks/throughput.py                       a 29 M model on a CPU (within 5 minutes), the 7B shape on a GPU
    python benchmarks/throughput.py --json out.json --plot pictures
    python benchmarks/throughput.py --repeat 3 --json out.json          the table three times, all in one file
    python benchmarks/throughput.py --sweep ratio frames valid --plot pictures
    python benchmarks/throughput.py --preset text-1024 --baseline synpo-fast-unshared --variants synpo-fast
    python benchmarks/throughput.py --preset responses                  ten responses of one video beside their 45 pairs
    python benchmarks/throughput.py --preset gpu --largest_batch

A step is forward, backward and optimiser step, on the same pairs with the same weights. Every variant is checked before its time
is shown (steps/agreement.py). README.md beside this file describes each row.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
# Hides the memory profiler's warnings about blocks allocated before it started.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import environment, gpu_state, write_json
from benchmarks.contest import Options
from benchmarks.steps import BASELINE, OF_PAIRS, OF_SEVERAL_RESPONSES, VARIANTS
from benchmarks.steps.largest_batch import largest_batch
from benchmarks.steps.measure import compare
from benchmarks.steps.presets import PRESETS, Preset, build_policy
from benchmarks.steps.sweeps import SWEEPS, presets_along
from benchmarks.steps.tables import repeats_table, table
from benchmarks.steps.workload import MARKERS, make_workload, visual_tokens
from synpo_fast.data.comparisons import PAIRS_FROM

LARGEST_FOR = (BASELINE, "synpo-released", "synpo-fast-unshared", "synpo-fast")


def faults(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line for each variant that was wrong, and each of ours that crashed. A peer that cannot run is not a fault."""
    return [
        f"{row['name']}: {row['skipped']}"
        for row in rows
        if row["faulty"] and (row["ours"] or row["skipped"].startswith("WRONG"))
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=list(PRESETS), help="default: cpu on a CPU, gpu on a GPU; text and text-1024 have no video"
    )
    parser.add_argument("--frames", type=int, metavar="N", help="frames of a video")
    parser.add_argument("--size", type=int, metavar="PX", help="width and height of a frame in pixels")
    parser.add_argument("--prefix", type=int, metavar="N", help="tokens of a prompt, including its video")
    parser.add_argument("--completion", type=int, metavar="N", help="tokens of a response, on average")
    parser.add_argument(
        "--spread", type=float, metavar="SHARE", help="response lengths differ from --completion by up to this share"
    )
    parser.add_argument(
        "--pairs", type=int, metavar="B", help="prompts in a step; each is a pair if it has two responses"
    )
    parser.add_argument("--responses", type=int, metavar="K", help="responses to a prompt (default 2, or the preset's)")
    parser.add_argument(
        "--pairs_from", choices=list(PAIRS_FROM), help="which of more than two responses are compared (default all)"
    )
    parser.add_argument("--lora_r", type=int, metavar="R", help="rank of the LoRA adapter")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="dtype of the model; default: the preset's")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in every variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument(
        "--baseline", choices=list(VARIANTS), metavar="NAME", help=f"compare speed-ups with this (default {BASELINE})"
    )
    parser.add_argument("--repeat", type=int, metavar="N", help="measure the table N times (default 1)")
    parser.add_argument("--rounds", type=int, metavar="K", help="timed rounds (default 5; 3 in a sweep)")
    parser.add_argument(
        "--budget", type=float, default=150.0, metavar="SECONDS", help="end the rounds after this, not before the third"
    )
    parser.add_argument(
        "--sweep", nargs="+", choices=list(SWEEPS), default=[], help="measure along these axes, in place of the table"
    )
    parser.add_argument(
        "--largest_batch", action="store_true", help="find the most pairs that fit in memory, in place of the table"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and pairs")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", metavar="DIR", help="write pictures (needs matplotlib)")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if args.largest_batch and args.device.type != "cuda":
        parser.error("--largest_batch fills a GPU's memory and needs one")
    for name in ("baseline", "repeat"):
        if getattr(args, name) is not None and (args.sweep or args.largest_batch):
            parser.error(f"--{name} is for the table, not for --sweep or --largest_batch")
    args.baseline = args.baseline or BASELINE
    if args.variants and args.baseline not in args.variants:
        args.variants = [args.baseline, *args.variants]  # every ratio needs it
    try:
        args.preset = chosen_preset(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def chosen_preset(args: argparse.Namespace) -> Preset:
    """The preset with the changes of the command line. Without --prefix the prompt grows and shrinks with --frames and --size."""
    preset = PRESETS[args.preset or ("gpu" if args.device.type == "cuda" else "cpu")]
    names = (
        "frames", "size", "prefix", "completion", "spread", "pairs", "responses", "pairs_from", "lora_r", "dtype"
    )  # fmt: skip
    changes: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name, value in changes.items():
        lowest = {"spread": 0.0, "frames": 0, "responses": 2, "dtype": "", "pairs_from": ""}.get(name, 1)
        if value < lowest:
            raise ValueError(f"--{name} must be at least {lowest}, not {value}")
    if not 0 <= changes.get("spread", 0.0) < 1:
        raise ValueError(f"--spread must lie in [0, 1), not {changes['spread']}")
    if preset.family == "text" and (changes.get("frames") or changes.get("size")):
        raise ValueError(f"preset {preset.name!r} takes no --frames and no --size")
    for name in ("rounds", "repeat"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    text = preset.prefix - visual_tokens(preset)
    preset = replace(preset, **changes, checkpointing=args.checkpointing)
    if "prefix" not in changes and ("frames" in changes or "size" in changes):
        preset = replace(preset, prefix=visual_tokens(preset) + text)
    if preset.frames and visual_tokens(preset) + MARKERS >= preset.prefix:
        raise ValueError(
            f"{preset.frames} frames of {preset.size} px are {visual_tokens(preset)} tokens, which leaves no text in "
            f"--prefix {preset.prefix}"
        )
    return preset


def run_tables(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Measures the table --repeat times, each time with a newly built model, and puts workload and runs into the record."""
    options = Options(args.device, args.rounds or 5, args.budget, seed=args.seed)
    usual = OF_SEVERAL_RESPONSES if args.preset.responses > 2 else OF_PAIRS
    variants = [VARIANTS[name] for name in args.variants or usual]
    record["runs"] = []
    for _ in range(args.repeat or 1):
        machine = environment(args.device)
        start = {key: machine[key] for key in ("time", "load_average") if key in machine}
        workload = make_workload(args.preset, args.device, seed=args.seed)
        run = compare(workload, variants, options, baseline=args.baseline)
        record["workload"] = run.pop("workload")
        print(table(record["workload"], run), flush=True)
        record["runs"].append(start | run)
        if args.json:  # after every run, so that an interrupted run keeps its results
            write_json(args.json, record)
        del workload
        gc.collect()
    if len(record["runs"]) > 1:
        print(repeats_table(record["runs"], args.baseline), flush=True)


def run_sweep(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Makes one comparison at each point of a sweep, with one pair per step. The model is built once."""
    sweep = SWEEPS[name]
    options = Options(args.device, args.rounds or 3, args.budget, seed=args.seed)
    policy = build_policy(args.preset, args.device, args.seed)
    points = []
    for value, preset in presets_along(sweep, replace(args.preset, pairs=1), args.device.type):
        workload = make_workload(preset, args.device, seed=args.seed, policy=policy)
        record = compare(workload, [VARIANTS[variant] for variant in sweep.variants], options)
        print(table(record["workload"], record), flush=True)
        points.append({"value": value, **record})
        gc.collect()
    return {"name": name, "label": sweep.label, "points": points}


def run_largest(args: argparse.Namespace) -> dict[str, int]:
    policy = build_policy(args.preset, args.device, args.seed)
    found = {}
    for name in LARGEST_FOR:
        found[name] = largest_batch(args.preset, policy, VARIANTS[name], args.device, seed=args.seed)
        print(f"{name}: {found[name]} pairs", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, writes JSON and pictures. Returns 1 if a variant was wrong or one of ours crashed."""
    args = parse(argv)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # a deprecated name that TRL uses
    record: dict[str, Any] = {"environment": environment(args.device), "baseline": args.baseline}
    load, cores = record["environment"].get("load_average", [0.0])[0], record["environment"]["cores"]
    if args.device.type == "cpu" and load > 0.5 * cores:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): even the ratios may be off\n", file=sys.stderr)
    if args.sweep:
        record["sweeps"] = [run_sweep(name, args) for name in args.sweep]
    elif args.largest_batch:
        record["largest_batch"] = run_largest(args)
    else:
        run_tables(args, record)
    if args.device.type == "cuda":
        record["environment"]["gpu"]["after"] = gpu_state()
    if args.json:
        write_json(args.json, record)
    if args.plot:
        from benchmarks.steps.plot import plot

        for path in plot(record, Path(args.plot)):
            print(f"wrote {path}")
    points = [point for sweep in record.get("sweeps", []) for point in sweep["points"]]
    found = faults([row for each in [*record.get("runs", []), *points] for row in each["rows"]])
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
