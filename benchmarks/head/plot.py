"""Draws pictures of kernels.py's JSON.

    python benchmarks/head/plot.py FILE --out DIR [--kind cases | overview]

cases: one picture per case, with bars for the time relative to the bare GEMMs and bars for the peak extra memory.
overview: one picture per shape, with one line per provider: the same time ratio against the number of valid rows.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common import format_bytes, format_seconds, read_record
from benchmarks.head.providers import FLOOR
from benchmarks.pictures import OURS_COLOUR, PEER_COLOUR, QUIET, clean_axes, machine_line, prepare_folder, spread_labels

FLOOR_COLOUR = "#3c3c3c"
OWN_COLOURS = {"synpo-triton": OURS_COLOUR, "synpo-native": OURS_COLOUR, "synpo-chunked": "#e59a73"}
# Longer bars are cut here, and labelled so: one slow peer must not squeeze the rest.
LONGEST_RATIO = 10.0


def plot(record: dict[str, Any], folder: Path, kind: str = "cases") -> list[Path]:
    """Writes the pictures into `folder` and returns their paths. Raises ImportError with a hint if matplotlib is missing."""
    prepare_folder(folder)
    machine = machine_line(record["environment"])
    if kind == "cases":
        return [_plot_case(case, machine, folder / f"{case_slug(case)}.png") for case in record["cases"]]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in record["cases"]:
        groups.setdefault((case["shape"], case["mode"], case["dtype"]), []).append(case)
    return [_plot_overview(cases, machine, folder / f"{'-'.join(key)}.png") for key, cases in groups.items()]


def case_slug(case: dict[str, Any]) -> str:
    words = (case["shape"], f"{case['valid_rows']}of{case['N']}", case["head"], case["mode"], case["dtype"])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))


def work_in_words(case: dict[str, Any]) -> str:
    return "forward only" if case["mode"] == "no_grad" else f"forward + backward, {case['head']} head"


def _colour(name: str) -> str:
    if name == FLOOR:
        return FLOOR_COLOUR
    return OURS_COLOUR if name.startswith("synpo-") else PEER_COLOUR


def _plot_case(case: dict[str, Any], machine: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    timed = [row for row in case["rows"] if row["seconds"] and row["ratio_to_floor"] is not None]
    timed.sort(key=lambda row: row["ratio_to_floor"])
    notes = [f"{row['name']}: {row['skipped']}" for row in case["rows"] if row["skipped"]]
    notes = [line for note in notes for line in textwrap.wrap(note, 150, subsequent_indent="    ")]

    bars, foot = 0.36 * max(len(timed), 1), 0.2 * (len(notes) + 2)
    height = 1.45 + bars + foot
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, height), width_ratios=[3, 2], sharey=True)
    figure.subplots_adjust(left=0.21, right=0.97, top=1 - 0.95 / height, bottom=(foot + 0.5) / height, wspace=0.06)
    _ratio_bars(left, timed)
    _memory_bars(right, timed)
    title = f"{case['shape']}: hidden {case['D']}, vocabulary {case['V']:,}; {work_in_words(case)}; {case['dtype']}"
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=13, weight="bold")
    rounds = max((row["seconds"]["rounds"] for row in timed), default=0)
    below = f"{case['valid_rows']:,} of {case['N']:,} rows valid. {machine}. Median of {rounds} interleaved rounds."
    figure.text(0.02, 1 - 0.55 / height, below, fontsize=9, color=QUIET)
    if notes:
        text = "Not shown\n" + "\n".join(notes)
        figure.text(0.02, 0.1 / height, text, fontsize=8, color=QUIET, va="bottom", linespacing=1.35)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _ratio_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = range(len(rows))
    limit = min(LONGEST_RATIO, max((row["ratio_to_floor"] for row in rows), default=1.0))
    axes.barh(places, [min(row["ratio_to_floor"], limit) for row in rows], color=[_colour(row["name"]) for row in rows])
    for place, row in zip(places, rows, strict=True):
        ratio, seconds = row["ratio_to_floor"], row["seconds"]
        label, end = f"{ratio:.2f}x   {format_seconds(seconds['median'])}", limit
        if ratio > limit:
            label += "   (bar cut)"
        else:  # quartiles of the time, scaled to the bar
            low, high = (ratio * seconds[quartile] / seconds["median"] for quartile in ("low", "high"))
            end = min(max(ratio, high), limit * 1.05)
            axes.plot([low, end], [place, place], color="black", linewidth=1, alpha=0.6)
        axes.text(end + limit * 0.02, place + 0.02, label, va="center", fontsize=9)
    axes.axvline(1.0, color=FLOOR_COLOUR, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(places, [row["name"] for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(_colour(row["name"]) if row["name"].startswith("synpo-") else "black")
    axes.set_xlim(0, limit * 1.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time over the bare GEMMs (line: quartiles)")
    clean_axes(axes)


def _memory_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    counts = [row["peak_extra_bytes"] for row in rows]
    longest = max([count for count in counts if count is not None], default=1) or 1
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if count is None:
            axes.text(longest * 0.02, place, "(buffers given)", va="center", fontsize=8, color=QUIET)
            continue
        axes.barh(place, count, color=_colour(row["name"]))
        axes.text(count + longest * 0.02, place, format_bytes(count), va="center", fontsize=9)
    axes.set_xlim(0, longest * 1.25)
    axes.set_xticks([])
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xlabel("peak extra memory, results included")
    clean_axes(axes)


def _plot_overview(cases: Sequence[dict[str, Any]], machine: str, path: Path) -> Path:
    import matplotlib.pyplot as plt

    first = cases[0]
    shares = sorted({case["valid"] for case in cases})
    heads = sorted({case["head"] for case in cases})
    names = [row["name"] for row in first["rows"] if row["name"] != FLOOR]
    # matplotlib's tab10 and Dark2 without oranges and reds, which mark our contestants
    palette = [f"C{i}" for i in (0, 2, 4, 5, 6, 7, 8, 9)] + ["#1b9e77", "#7570b3", "#66a61e", "#e7298a"]
    colours = {name: OWN_COLOURS.get(name, palette[i % len(palette)]) for i, name in enumerate(names)}
    size = (1 + 6.2 * len(heads), 1.2 + 3.9 * len(shares))
    figure, grid = plt.subplots(len(shares), len(heads), figsize=size, squeeze=False)
    for i, share in enumerate(shares):
        for j, head in enumerate(heads):
            chosen = [case for case in cases if case["valid"] == share and case["head"] == head]
            _overview_panel(grid[i][j], chosen, colours)
            if chosen:
                grid[i][j].set_title(
                    f"{work_in_words(chosen[0])}, {share:.0%} of rows valid", fontsize=10.5, loc="left"
                )
    figure.suptitle(
        f"{first['shape']}: hidden {first['D']}, vocabulary {first['V']:,}; {first['dtype']}. Time over the bare GEMMs",
        x=0.02,
        ha="left",
        fontsize=13,
        weight="bold",
    )
    figure.text(0.02, 1 - 0.52 / size[1], f"{machine}. Lower is better; 1 is the floor.", fontsize=9, color=QUIET)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / size[1]), w_pad=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _overview_panel(axes: Any, cases: Sequence[dict[str, Any]], colours: dict[str, Any]) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in sorted(cases, key=lambda case: case["valid_rows"]):
        for row in case["rows"]:
            if row["ratio_to_floor"] is not None and row["name"] in colours:
                lines.setdefault(row["name"], []).append((case["valid_rows"], row["ratio_to_floor"]))
    if not lines:
        axes.set_axis_off()
        return
    for name, points in lines.items():
        own = name.startswith("synpo-")
        axes.plot(*zip(*points, strict=True), "o-", color=colours[name], linewidth=2.6 if own else 1.3, markersize=4)
    axes.axhline(1.0, color=FLOOR_COLOUR, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    counts = sorted({case["valid_rows"] for case in cases})
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xlim(counts[0] / 1.15, counts[-1] * (counts[-1] / counts[0]) ** 0.45 * 1.3)
    top = max(ratio for points in lines.values() for _, ratio in points)
    ticks = [tick for tick in (0.8, 1, 1.2, 1.5, 2, 3, 5, 8, 15, 30, 60, 120) if tick <= top * 1.2]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.9, top * 1.25)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_xlabel("valid rows")
    clean_axes(axes)
    ends = sorted((points[-1][1], name) for name, points in lines.items())
    places = spread_labels([math.log(ratio) for ratio, _ in ends], math.log(top * 1.25 / 0.9) / 17)
    for (ratio, name), place in zip(ends, places, strict=True):
        x, _ = lines[name][-1]
        bold = "bold" if name.startswith("synpo-") else "normal"
        axes.annotate(
            f"{name} {ratio:.2f}",
            (x, ratio),
            xytext=(counts[-1] * (counts[-1] / counts[0]) ** 0.07 * 1.05, math.exp(place)),
            fontsize=8,
            weight=bold,
            color=colours[name],
            va="center",
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of kernels.py")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--kind", choices=["cases", "overview"], default="cases", help="see above")
    args = parser.parse_args(argv)
    record = read_record(parser, args.file, script="kernels.py", part=lambda r: [case["shape"] for case in r["cases"]])
    for path in plot(record, args.out, args.kind):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
