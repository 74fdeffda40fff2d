"""Measures how fast frames are read from video files: the backends of decode_frames, and PyAV that decodes every frame.

    python benchmarks/decode.py                       clips of 240p to 1080p, five codecs, 8 frames up to all of them
    python benchmarks/decode.py --quick               small clips, under a minute
    python benchmarks/decode.py --codecs vp9 --json out.json --plot pictures
    python benchmarks/decode.py --device cuda         decode to the GPU

Every frame of a clip carries its number. A contestant that returns another frame than requested is shown as WRONG, without a
time. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common import environment, format_seconds, format_table, write_json
from benchmarks.contest import Options, Row, attempt, judge_row, row_record
from benchmarks.decoding.cases import (
    BASELINE,
    CONTESTANTS,
    DEFAULT_CASES,
    OURS,
    QUICK_CASES,
    Case,
    prepare,
    why_wrong,
)
from benchmarks.decoding.cold import first_frames, first_table
from benchmarks.pictures import prepare_folder
from synpo_fast.profiling.rounds import interleave


def run_case(case: Case, names: Sequence[str], folder: Path, options: Options) -> dict[str, Any]:
    """Checks all contestants on one case, times them in turn, checks them again, and returns the case as a JSON record."""
    path = case.clip.file(folder)

    def judge(frames: Any) -> tuple[dict[str, float], str | None]:
        return {}, why_wrong(frames, case)

    rows = [Row(name) for name in names]
    for row in rows:
        row.step = attempt(row, partial(prepare, row.name, case, path, options.device))
        row.setting = row.step.setting if row.step is not None else ""
        judge_row(row, judge)
    steps = {row.name: row.step.run for row in rows if row.step is not None}
    samples = interleave(
        steps, rounds=options.rounds, device=options.device, budget_seconds=options.budget_seconds, min_rounds=3
    )
    for row in rows:
        row.samples = samples.get(row.name, [])
        judge_row(row, judge)
    record = {**asdict(case.clip), "fps": case.clip.num_frames / case.clip.seconds, "wanted": case.wanted}
    record |= {"num_frames": case.clip.num_frames, "num_wanted": len(case.indices), "bytes": path.stat().st_size}
    return {**record, "rows": [case_row(row, samples.get(BASELINE), case) for row in rows]}


def case_row(row: Row, baseline: list[float] | None, case: Case) -> dict[str, Any]:
    """The JSON row of a contestant. `speedup` is the median over rounds of the baseline's time / the contestant's."""
    whole = row_record(row, None)
    record = {key: whole[key] for key in ("name", "setting", "seconds", "skipped", "faulty")}
    record |= {"speedup": None, "frames_per_second": None, "video_seconds_per_second": None}
    if row.skipped is None:
        median = record["seconds"]["median"]
        record["frames_per_second"] = len(case.indices) / median
        record["video_seconds_per_second"] = case.clip.seconds / median
        if baseline is not None:
            record["speedup"] = statistics.median(other / own for own, other in zip(row.samples, baseline, strict=True))
    return record


def case_title(case: dict[str, Any]) -> str:
    keys = "one group of pictures" if case["keyframe_every"] >= case["num_frames"] else "a keyframe every "
    if keys.endswith(" "):
        keys += f"{case['keyframe_every'] / case['fps']:g} s" if case["keyframe_every"] > 1 else "frame"
    size = f"{case['codec']} {case['width']}x{case['height']}, {case['seconds']} s, {keys}"
    return f"{size}: {case['num_wanted']} of {case['num_frames']} frames"


def case_table(case: dict[str, Any]) -> str:
    header = ["backend", "median", "(low - high)", "frames/s", "video s/s", "x baseline", "how"]
    lines = []
    for row in case["rows"]:
        if row["skipped"] is not None:
            lines.append([row["name"], "-", "", "-", "-", "-", f"skipped: {row['skipped']}"])
            continue
        seconds = row["seconds"]
        spread = f"({format_seconds(seconds['low'])} - {format_seconds(seconds['high'])})"
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
        rates = [f"{row['frames_per_second']:.0f}", f"{row['video_seconds_per_second']:.0f}"]
        lines.append([row["name"], format_seconds(seconds["median"]), spread, *rates, speedup, row["setting"]])
    return f"{case_title(case)}\n{format_table(header, lines)}\n"


def plot(record: dict[str, Any], folder: Path) -> Path:
    """Draws every backend's speed-up over the baseline, one group of lines per case. Raises ImportError without matplotlib."""
    prepare_folder(folder)
    import matplotlib.pyplot as plt

    cases = record["cases"]
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.5 * len(cases)))
    names = [row["name"] for row in cases[0]["rows"] if row["name"] != BASELINE]
    for at, name in enumerate(names):
        label: str | None = name
        for place, case in enumerate(cases):
            y = place + (at - (len(names) - 1) / 2) * 0.7 / len(names)
            for speedup in (row["speedup"] for row in case["rows"] if row["name"] == name and row["speedup"]):
                axes.plot([1, speedup], [y, y], color=f"C{at}", marker="o", markersize=4, markevery=[1], label=label)
                side, shift = ("left", 1.04) if speedup >= 1 else ("right", 0.96)
                axes.text(speedup * shift, y, f"{speedup:.2f}", va="center", ha=side, fontsize=7)
                label = None
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high * 1.1)
    axes.set_yticks(range(len(cases)), [case_title(case) for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("speed over decoding and converting every frame with PyAV, then picking")
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    path = folder / "decode.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    codecs = sorted({case.clip.codec for case in DEFAULT_CASES})
    parser.add_argument("--quick", action="store_true", help="small clips and three rounds")
    parser.add_argument("--codecs", nargs="+", choices=codecs, metavar="NAME", help=", ".join(codecs))
    parser.add_argument("--backends", nargs="+", choices=list(CONTESTANTS), metavar="NAME", help=", ".join(CONTESTANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the decoded frames")
    parser.add_argument("--rounds", type=int, metavar="K", help="timed rounds of a case (5; with --quick 3)")
    parser.add_argument(
        "--budget",
        type=float,
        default=8.0,
        metavar="SECONDS",
        help="end a case's rounds after this, not before the third",
    )
    parser.add_argument("--clips", type=Path, metavar="DIR", help="folder that keeps the clips between runs")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a picture (needs matplotlib)")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    args.rounds = args.rounds or (3 if args.quick else 5)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    args.clips = args.clips or Path(tempfile.gettempdir()) / f"synpo_fast-clips-{os.getuid()}"
    args.cases = [
        case for case in (QUICK_CASES if args.quick else DEFAULT_CASES) if case.clip.codec in (args.codecs or codecs)
    ]
    args.backends = args.backends or list(CONTESTANTS)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, writes JSON and a picture. Returns 1 if one of our own backends was wrong or crashed."""
    args = parse(argv)
    record: dict[str, Any] = {"environment": environment(args.device), "cases": []}
    load, cores = record["environment"].get("load_average", [0.0])[0], record["environment"]["cores"]
    if load > 0.5 * cores:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): even the ratios may be off\n", file=sys.stderr)
    start = time.perf_counter()
    for clip in dict.fromkeys(case.clip for case in args.cases):
        clip.file(args.clips)
    print(f"clips in {args.clips}, ready after {time.perf_counter() - start:.0f} s\n", file=sys.stderr)
    options = Options(args.device, args.rounds, args.budget)
    for case in args.cases:
        record["cases"].append(run_case(case, args.backends, args.clips, options))
        print(case_table(record["cases"][-1]), flush=True)
    codec = "vp9" if args.device.type == "cpu" else "h264"  # DALI can decode it on this device
    cold = [case for case in args.cases if case.clip.codec == codec and case.wanted == "8"][:1] or args.cases[:1]
    record["first_frames"] = first_frames(cold[0], args.backends, args.clips, args.device, runs=1 if args.quick else 3)
    print(first_table(record["first_frames"]), flush=True)
    if args.json:
        write_json(args.json, record)
    if args.plot:
        print(f"wrote {plot(record, args.plot)}")
    faults = [
        f"{row['name']} on {case_title(case)}: {row['skipped']}"
        for case in record["cases"]
        for row in case["rows"]
        if row["faulty"] and row["name"] in OURS
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
