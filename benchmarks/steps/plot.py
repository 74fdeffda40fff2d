"""Draws pictures of throughput.py's JSON.

    python benchmarks/steps/plot.py FILE --out DIR

gains.png: the time that each change saves, from TRL's step to synpo-fast. variants.png: every variant's speed-up, measured and
predicted from its passes, and its memory. sweep-<name>.png: the speed-up along one axis, measured and predicted.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common import format_bytes, format_seconds, read_record
from benchmarks.pictures import OURS_COLOUR, PEER_COLOUR, QUIET, clean_axes, machine_line, prepare_folder, spread_labels
from benchmarks.steps import BASELINE, GAINS
from benchmarks.steps.cost import tokens_only_limit
from synpo_fast.profiling.rounds import ROUNDS_FOR_AN_INTERVAL

SAVED, COST, LIMIT_COLOUR = "#f3d9cb", "#c9c9c9", "#3c3c3c"
SWEEP_COLOURS = {
    BASELINE: PEER_COLOUR, "synpo-fast": OURS_COLOUR, "synpo-fast-unshared": "#1b7f79", "synpo-valid-rows": "#7570b3",
    "synpo-fused-head": "#a08a1e",
}  # fmt: skip


def plot(record: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures that the record has data for. Raises ImportError with a hint if matplotlib is missing."""
    prepare_folder(folder)
    machine = machine_line(record["environment"])
    paths = []
    for run in record.get("runs", [])[:1]:
        if record["baseline"] == BASELINE and _gain_rows(run):
            paths.append(_gains(record, machine, folder / "gains.png"))
        if any(row["ratio"] is not None for row in run["rows"]):
            paths.append(_variants(record, machine, folder / "variants.png"))
    for sweep in record.get("sweeps", []):
        paths.append(_sweep(sweep, machine, folder / f"sweep-{sweep['name']}.png"))
    return paths


def _measured_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that plot draws. Raises KeyError or TypeError if throughput.py did not write the record."""
    points = [point for sweep in record.get("sweeps", []) for point in sweep["points"]]
    rows = [row for run in [*record.get("runs", [])[:1], *points] for row in run["rows"]]
    return [row for row in rows if row["ratio"] is not None] if record["baseline"] else []


def workload_line(workload: dict[str, Any]) -> str:
    video = f"{workload['frames']} frames of {workload['size']} px, " if workload["frames"] else ""
    return (
        f"{workload['parameters'] / 1e6:.0f} M parameters, LoRA r={workload['lora_r']}, {workload['dtype']}; "
        f"{workload['pairs']} pairs per step: {video}prompts of {workload['prefix']} tokens, responses of "
        f"{workload['completion']}"
    )


def _rounds(rows: Sequence[dict[str, Any]]) -> int:
    return max((row["seconds"]["rounds"] for row in rows if row["seconds"]), default=0)


def _interval_name(rounds: int) -> str:
    """A name for the interval that median_interval gives for this number of rounds."""
    return "the median's 90 % interval" if rounds >= ROUNDS_FOR_AN_INTERVAL else "lowest to highest"


def _gains(record: dict[str, Any], machine: str, path: Path) -> Path:
    """Draws a waterfall: each bar is a step's time, its pale end the time saved compared with the bar above."""
    import matplotlib.pyplot as plt

    rows = _gain_rows(record["runs"][0])
    height = 1.75 + 0.5 * len(rows)
    figure, axes = plt.subplots(figsize=(10.5, height))
    figure.subplots_adjust(left=0.27, right=0.97, top=1 - 1.0 / height, bottom=0.65 / height)
    times = [row["seconds"]["median"] for row in rows]
    longest = max(times)
    for place, (row, seconds) in enumerate(zip(rows, times, strict=True)):
        before = times[place - 1] if place else seconds
        axes.barh(place, min(seconds, before), color=OURS_COLOUR if row["ours"] else PEER_COLOUR)
        axes.barh(place, abs(before - seconds), left=min(seconds, before), color=SAVED if before > seconds else COST)
        change = ""
        if place:
            part = (before - seconds) / times[0]
            change = f"   {'-' if part >= 0 else '+'}{abs(part):.0%} of the first"
        label = f"{format_seconds(seconds)}   {row['ratio']:.2f}x{change}"
        axes.text(max(seconds, before) + 0.01 * longest, place, label, va="center", fontsize=9.5)
    axes.set_yticks(range(len(rows)), [_step_label(row, place) for place, row in enumerate(rows)])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.5)
    axes.set_xlabel("seconds of a training step: forward, backward and optimiser")
    clean_axes(axes)
    figure.text(
        0.02, 1 - 0.32 / height, "Where the gain comes from, one change after another", fontsize=13, weight="bold"
    )
    below = f"{workload_line(record['workload'])}\n{machine}. Medians of {_rounds(rows)} interleaved rounds."
    figure.text(0.02, 1 - 0.8 / height, below, fontsize=8.5, color=QUIET)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _gain_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the waterfall; none if the first was not measured, since all others are compared with it."""
    by_name = {row["name"]: row for row in run["rows"]}
    rows = [by_name[name] for name in GAINS if name in by_name and by_name[name]["seconds"]]
    return rows if rows and rows[0]["name"] == BASELINE else []


def _step_label(row: dict[str, Any], place: int) -> str:
    return row["title"] if place == 0 else f"+ {row['title']}"


def _variants(record: dict[str, Any], machine: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    every_row, baseline = record["runs"][0]["rows"], record["baseline"]
    rows = [row for row in every_row if row["ratio"] is not None]
    notes = [f"{row['name']}: {row['skipped']}" for row in every_row if row["skipped"]]
    notes = [line for note in notes for line in textwrap.wrap(note, 150, subsequent_indent="    ")]
    foot = 0.2 * (len(notes) + 1) if notes else 0.0
    height = 1.75 + 0.34 * len(rows) + foot
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, height), width_ratios=[3, 2], sharey=True)
    figure.subplots_adjust(left=0.2, right=0.97, top=1 - 1.0 / height, bottom=(foot + 0.65) / height, wspace=0.05)
    colours = [OURS_COLOUR if row["ours"] else PEER_COLOUR for row in rows]
    places = range(len(rows))
    left.barh(places, [row["ratio"] for row in rows], color=colours)
    for place, row in enumerate(rows):
        left.plot([row["ratio_low"], row["ratio_high"]], [place] * 2, color="black", linewidth=1, alpha=0.6)
        left.plot(
            [row["limit"]] * 2, [place - 0.4, place + 0.4], color=LIMIT_COLOUR, linewidth=1.6, linestyle=(0, (2, 1))
        )
        end = max(row["ratio_high"], row["limit"])
        left.text(
            end + 0.05,
            place,
            f"{row['ratio']:.2f}x  {format_seconds(row['seconds']['median'])}",
            va="center",
            fontsize=9,
        )
    top = max(max(row["ratio_high"], row["limit"]) for row in rows)
    left.set_xlim(0, top * 1.32)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_yticks(places, [row["name"] for row in rows])
    interval = _interval_name(_rounds(rows))
    left.set_xlabel(f"speed-up over {baseline}   (line: {interval}, dashed: predicted by FLOPs)")
    clean_axes(left)
    most = max(row["peak_memory_bytes"] for row in rows)
    right.barh(places, [row["peak_memory_bytes"] for row in rows], color=colours)
    for place, row in enumerate(rows):
        label = format_bytes(row["peak_memory_bytes"])
        right.text(row["peak_memory_bytes"] + 0.015 * most, place, label, va="center", fontsize=9)
    right.set_xlim(0, most * 1.25)
    right.set_xticks([])
    right.tick_params(axis="y", left=False, labelleft=False)
    right.set_xlabel("peak memory of a step, weights included")
    clean_axes(right)
    figure.text(
        0.02, 1 - 0.32 / height, "Variants of a training step: same pairs, same weights", fontsize=13, weight="bold"
    )
    below = f"{workload_line(record['workload'])}\n{machine}. Medians of {_rounds(rows)} interleaved rounds."
    figure.text(0.02, 1 - 0.8 / height, below, fontsize=8.5, color=QUIET)
    if notes:
        figure.text(0.02, 0.1 / height, "Not shown\n" + "\n".join(notes), fontsize=8, color=QUIET, va="bottom")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _sweep(sweep: dict[str, Any], machine: str, path: Path) -> Path:
    """Draws the speed-up over the baseline along one axis: measured with its spread, and predicted as a dashed line."""
    import matplotlib.pyplot as plt

    points = sweep["points"]
    figure, axes = plt.subplots(figsize=(9.5, 5.6))
    figure.subplots_adjust(left=0.09, right=0.76, top=0.83, bottom=0.12)
    values = [point["value"] for point in points]
    ends: list[tuple[float, str, str]] = []
    for index, row in enumerate(points[0]["rows"]):
        line = [(point["value"], point["rows"][index]) for point in points if point["rows"][index]["ratio"] is not None]
        if not line:
            continue
        colour = SWEEP_COLOURS.get(row["name"], "#555555")
        xs = [value for value, _ in line]
        axes.fill_between(
            xs, [r["ratio_low"] for _, r in line], [r["ratio_high"] for _, r in line], color=colour, alpha=0.15
        )
        axes.plot(xs, [r["ratio"] for _, r in line], "o-", color=colour, linewidth=2)
        if row["name"] != BASELINE:
            axes.plot(xs, [r["limit"] for _, r in line], "--", color=colour, linewidth=1.2)
        ends.append((line[-1][1]["ratio"], f"{row['name']}  {line[-1][1]['ratio']:.2f}x", colour))
    if sweep["name"] == "ratio":
        tokens = [tokens_only_limit(value, share_prefix=True) for value in values]
        axes.plot(values, tokens, ":", color=QUIET, linewidth=1.4)
        ends.append((tokens[-1], "3(r+1)/(r+2), language\nmodel's tokens alone", QUIET))
    _finish_sweep(axes, sweep, values, ends)
    figure.text(0.02, 0.945, f"Speed-up over {BASELINE}", fontsize=13, weight="bold")
    workload, rounds = points[0]["workload"], _rounds(points[0]["rows"])
    about = f"{workload['parameters'] / 1e6:.0f} M parameters, LoRA r={workload['lora_r']}, {workload['dtype']}"
    if sweep["name"] != "valid":
        about += f", responses of {workload['completion']} tokens"
    below = (
        f"{about}, one pair per step. {machine}.\n"
        f"Solid: medians of {rounds} interleaved rounds (band: {_interval_name(rounds)}). Dashed: predicted by FLOPs."
    )
    figure.text(0.02, 0.87, below, fontsize=8.5, color=QUIET)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _finish_sweep(axes: Any, sweep: dict[str, Any], values: list[float], ends: list[tuple[float, str, str]]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:.0%}" if sweep["name"] == "valid" else f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.set_xlabel(sweep["label"])
    axes.set_ylabel("times as fast")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    clean_axes(axes)
    ends = sorted(ends)
    places = spread_labels([end for end, _, _ in ends], axes.get_ylim()[1] / 14)
    for (end, label, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            label, (values[-1], end), xytext=(1.03, place), textcoords=axes.get_yaxis_transform(), fontsize=9,
            color=colour, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of throughput.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    args = parser.parse_args(argv)
    record = read_record(parser, args.file, script="throughput.py", part=_measured_rows)
    for path in plot(record, args.out):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
