"""Writes report.html: one self-contained page about a run, or a comparison of several runs.

The page is made from the files in a run's folder, so it can be made again at any time, even for a run that was killed:
`synpo-fast report DIR [DIR ...]`. The trainer writes one at the end of every run. Charts (SVG) and video frames are embedded in
the file. The page works offline, on a phone, in dark mode and with scripts disabled.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.report.data import read_json_object, read_run
from synpo_fast.report.page import page
from synpo_fast.terminal.printable import printable

DONE, USAGE = 0, 2
NAME = "report.html"
LEFT_BY_RUNS = ("metrics.jsonl", "config.yaml", "profile.json")
PAGE_START, TITLE_END, HEAD_BYTES = b"<!doctype html>", "– synpo_fast</title>".encode(), 2**16


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page and returns its path.

    out: the default is report.html in the run's folder. For several runs it is in their common parent folder, or in the current
    folder if they have different parents. A missing or broken file is named on the page. Raises ValueError if no folder is given,
    one is given twice, does not exist or holds no run, or if `out` cannot be a new report; OSError if writing fails.
    """
    folders = [Path(folder) for folder in run_dirs]
    _check(folders)
    target = Path(out) if out is not None else _default_target(folders)
    _check_target(target)
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    problems: list[str] = []
    demo = _demo([*folders, target.parent], problems)
    # A lone surrogate in a caption cannot be encoded as UTF-8.
    content = page(runs, demo, problems).encode("utf-8", errors="replace")
    partial = target.with_name(f"{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)
    return target


def main(argv: list[str]) -> int:
    """Runs `synpo-fast report`. Exit status: 0 if the page was written, 2 for a wrong call or if the page cannot be written."""
    parser = argparse.ArgumentParser(
        prog="synpo-fast report", description="Write a run's report, or compare several runs."
    )
    parser.add_argument(
        "runs", metavar="DIR", nargs="+", type=Path, help="output_dir of a run; several runs are compared"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="default: report.html in DIR; several runs: in the folder that they share, otherwise in the current folder",
    )
    arguments = parser.parse_args(argv)
    try:
        file = write_report(arguments.runs, arguments.out)
    except (ValueError, OSError) as error:
        print(f"synpo-fast report: error: {printable(error)}", file=sys.stderr)
        return USAGE
    print(f"{file} ({file.stat().st_size / 1024:,.0f} KiB)")
    return DONE


def _check(folders: Sequence[Path]) -> None:
    if not folders:
        raise UserError("no run folder was given: give the output_dir of a run")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the output_dir of a run")
        if not any((folder / name).exists() for name in LEFT_BY_RUNS):
            raise UserError(f"{folder} holds no run (no {', no '.join(LEFT_BY_RUNS)}): give the output_dir of a run")
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"folder given more than once: {', '.join(twice)}")


def _check_target(target: Path) -> None:
    """Raises UserError if `target` is a folder, its folder is missing, or it exists and is not a report.

    --out may name the wrong file by mistake.
    """
    if target.is_dir():
        raise UserError(f"the page cannot be written to {target}: it is a folder, give a file name")
    if not target.parent.is_dir():
        if target.parent.exists():
            raise UserError(f"{target.parent} is not a folder: name another file with --out")
        raise UserError(f"the folder {target.parent} does not exist: make it, or name another file with --out")
    if target.exists() and not (target.suffix.lower() in (".html", ".htm") and _is_report(target)):
        raise UserError(
            f"{target} exists and is not a report of synpo-fast: remove it, or name another file with --out"
        )


def _is_report(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as page:
        head = page.read(HEAD_BYTES)
    return not head or (head.startswith(PAGE_START) and TITLE_END in head)


def _default_target(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / NAME
    parents = {folder.resolve().parent for folder in folders}
    return Path(os.path.relpath(parents.pop())) / NAME if len(parents) == 1 else Path(NAME)


def _names(folders: Sequence[Path]) -> list[str]:
    """The runs' names: the last parts of their paths, as few as make all names different."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"the same folder twice: {folders}")


def _demo(folders: Sequence[Path], problems: list[str]) -> tuple[dict[str, Any], Path] | None:
    """The first demo.json found in these folders, with its folder; None if there is none."""
    for folder in folders:
        if (folder / "demo.json").exists():
            found = read_json_object(folder / "demo.json", problems)
            return None if found is None else (found, folder.resolve())
    return None
