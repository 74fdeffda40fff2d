"""Writes the tables of the fused head in benchmarks/README.md, from kernels.py's JSON: `make docs`.

    python benchmarks/head/readme_table.py [FILE]

FILE is by default the committed results/cpu/kernels.json. A marked part of the page gets the measured tables, another one the
table of what each contestant computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.common import read_record
from benchmarks.head.providers import FLOOR, PROVIDERS, computes

BENCHMARKS = Path(__file__).resolve().parents[1]
PAGE = BENCHMARKS / "README.md"
RESULTS = BENCHMARKS / "results" / "cpu" / "kernels.json"
# {0} is the version of the package.
LABELS = {
    "synpo-native": ("synpo_fast, native", ""),
    "synpo-triton": ("synpo_fast, Triton", ""),
    "synpo-chunked": ("synpo_fast, chunked (plain torch)", ""),
    "eager-all-rows": ("eager, all rows", ""),
    "eager-valid-rows": ("eager, valid rows", ""),
    "torch-compile": ("torch.compile", ""),
    "torch-compile-max-autotune": ("torch.compile, max-autotune", ""),
    "torch-linear-ce": ("F.linear_cross_entropy, torch {0}", "torch"),
    "torch-linear-ce-chunked": ("the same in chunks, best options", ""),
    "liger": ("Liger {0} fused linear cross entropy", "liger_kernel"),
    "liger-wide": ("Liger {0}, larger chunks", "liger_kernel"),
    "liger-scaled": ("Liger {0} scaled cross entropy, per token", "liger_kernel"),
    "liger-preference": ("Liger {0} chunked preference, compiled; all rows", "liger_kernel"),
    "cut-cross-entropy": ("cut-cross-entropy {0}", "cut-cross-entropy"),
    "cut-cross-entropy-exact": ("cut-cross-entropy {0}, exact", "cut-cross-entropy"),
    "trl-fused-head": ("TRL {0} fused head", "trl"),
    "quack": ("QuACK {0}", "quack-kernels"),
}
WORK = {
    ("train", "frozen"): ("Frozen head, forward and backward", "two bare products"),
    ("train", "trainable"): ("Trained head, forward and backward", "three bare products"),
    ("no_grad", ""): ("Forward only", "the one bare product"),
}


def label(name: str, packages: dict[str, str | None]) -> str:
    """A contestant's name in the tables, with the version of its package (without a build such as +cpu)."""
    text, package = LABELS.get(name, (name, ""))
    version = (packages.get(package) or "").partition("+")[0]
    return text.format(version)


def size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Time over the floor's for every contestant with a right result, without the floor."""
    return {
        row["name"]: row["ratio_to_floor"]
        for row in case["rows"]
        if row["name"] != FLOOR and row["ratio_to_floor"] is not None
    }


def fastest(case: dict[str, Any]) -> list[str]:
    """The names of the contestants whose ratio, as printed, is the lowest."""
    printed = {name: f"{ratio:.2f}" for name, ratio in ratios(case).items()}
    best = min((float(text) for text in printed.values()), default=0.0)
    return [name for name, text in printed.items() if float(text) == best]


def results_table(cases: Sequence[dict[str, Any]], packages: dict[str, str | None]) -> list[str]:
    """One table: a line per contestant, and for each case (a dtype) its time over the floor and its memory. Bold is fastest."""
    by_dtype = {case["dtype"]: case for case in cases}
    rows = {dtype: {row["name"]: row for row in case["rows"]} for dtype, case in by_dtype.items()}
    found = {dtype: ratios(case) for dtype, case in by_dtype.items()}
    names = list(dict.fromkeys(name for ratio in found.values() for name in sorted(ratio, key=ratio.__getitem__)))
    columns = " | ".join(f"{dtype}: x floor | peak extra memory" for dtype in by_dtype)
    lines = [f"| provider | {columns} |", "|---|" + "---|---|" * len(by_dtype)]
    for name in names:
        cells = [label(name, packages)]
        for dtype, case in by_dtype.items():
            if name not in found[dtype]:
                cells += ["-", "-"]
                continue
            ratio = f"{found[dtype][name]:.2f}"
            cells.append(f"**{ratio}**" if name in fastest(case) else ratio)
            memory = rows[dtype][name]["peak_extra_bytes"]
            cells.append("-" if memory is None else size(memory))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdict(case: dict[str, Any], packages: dict[str, str | None]) -> str:
    """Names the fastest contestant of a case. Where it is a peer, says how much longer our fastest takes."""
    found, dtype = ratios(case), case["dtype"]
    ours = {name: ratio for name, ratio in found.items() if name.startswith("synpo-")}
    peers = {name: ratio for name, ratio in found.items() if name not in ours}
    if not ours or not peers:
        return f"{dtype}: {'no peer' if ours else 'none of ours'} ran."
    own, peer = min(ours, key=ours.__getitem__), min(peers, key=peers.__getitem__)
    if own in fastest(case):
        times = peers[peer] / ours[own]
        return f"{dtype}: the fastest peer, {label(peer, packages)}, takes {times:.2f} times as long."
    return f"{dtype}: **{label(peer, packages)} is faster**; ours takes {ours[own] / peers[peer]:.2f} times as long."


def results(record: dict[str, Any]) -> str:
    """The measured tables: one for each shape, number of rows, mode and kind of head."""
    packages = record["environment"]["packages"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for case in record["cases"]:
        head = case["head"] if case["mode"] == "train" else ""
        key = (case["D"], case["V"], case["valid_rows"], case["N"], case["mode"], head)
        groups.setdefault(key, []).append(case)
    command = record.get("command", "python benchmarks/kernels.py").split(" --json")[0]
    parts = [
        f'`{command}`. "x floor" is the time divided by that of the bare matrix products on the valid rows.\n'
        "Bold is the fastest. Contestants that cannot run on this machine are in the JSON, with the reason."
    ]
    for (dim, vocabulary, valid, total, mode, head), cases in groups.items():
        title, floor = WORK[mode, head]
        parts.append(
            f"**{title}** ({valid:,} of {total:,} rows valid, D = {dim}, V = {vocabulary}; the floor is {floor}):\n\n"
            + "\n".join(results_table(cases, packages))
            + "\n\n"
            + " ".join(verdict(case, packages) for case in cases)
        )
    parts.append(errors_in_words(record["cases"]))
    return "\n\n".join(parts) + "\n"


def errors_in_words(cases: Sequence[dict[str, Any]]) -> str:
    """The relative errors of log-probs, ours beside eager's, for each dtype."""
    said = []
    for dtype in dict.fromkeys(case["dtype"] for case in cases):
        errors = {row["name"]: row["error"] for case in cases if case["dtype"] == dtype for row in case["rows"]}
        own = next((name for name in ("synpo-native", "synpo-triton") if errors.get(name)), None)
        if own and errors.get("eager-valid-rows"):
            pair = errors[own]["log_probs"], errors["eager-valid-rows"]["log_probs"]
            said.append(f"{pair[0]:.1e} in {dtype} (eager {pair[1]:.1e})")
    return f"Errors are checked against fp64 before any time is shown. Relative errors of our log-probs: {', '.join(said)}."


def contestants() -> str:
    """The table of what each contestant computes, on a GPU; where it differs on a CPU, another line says so."""
    columns = ("rows", "output", "logits", "products", "gradients", "sums")
    heads = (
        "rows",
        "output",
        "logits stored",
        "products, frozen / trained head",
        "gradients",
        "head's gradient added up in",
    )
    lines = [f"| name | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in PROVIDERS:
        kinds = {device: computes(name, device) for device in ("cuda", "cpu")}
        lines.append(f"| {name} | {' | '.join(asdict(kinds['cuda'])[column] for column in columns)} |")
        if kinds["cpu"] != kinds["cuda"]:
            lines.append(f"| {name}, on a CPU | {' | '.join(asdict(kinds['cpu'])[column] for column in columns)} |")
    return "\n".join(lines) + "\n"


def page(text: str, record: dict[str, Any]) -> str:
    """The page with both marked parts written anew. Raises ValueError if a marker is missing."""
    for name, part in (("head results", results(record)), ("contestants", contestants())):
        begin, end = f"<!-- {name}: written by readme_table.py -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the page lacks the markers {begin.strip()!r} and {end!r}")
        before, _, rest = text.partition(begin)
        text = before + begin + "\n" + part + "\n" + end + rest.partition(end)[2]
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="JSON of kernels.py")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write")
    args = parser.parse_args(argv)
    record = read_record(parser, args.file, script="kernels.py", part=lambda r: [case["shape"] for case in r["cases"]])
    args.page.write_text(page(args.page.read_text(encoding="utf-8"), record), encoding="utf-8")
    print(f"wrote {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
