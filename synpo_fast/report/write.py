"""report.html: what happened in a run, or in several beside each other, on one page that needs nothing but itself.

The page is made from what a run leaves in its folder, so it can be made again at any time, also of a run that was killed:
`synpo-fast report DIR [DIR ...]`. The trainer writes one at the end of every run. Charts are SVG and frames are pictures inside
the file; it opens without a network, on a phone, in the dark, and without its script.
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
BEGINS, TITLE_ENDS, HEAD_BYTES = b"<!doctype html>", "– synpo_fast</title>".encode(), 2**16


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the page and returns where it lies.

    out: default is report.html in the run's folder, for several runs in the folder that they share, else in the current one.
    A file that is missing or broken is named on the page. Raises ValueError for a folder that is not there or holds no run, for
    one given twice, for none, and for a file at the page's place that is no report; OSError where the page can not be written.
    """
    folders = [Path(folder) for folder in run_dirs]
    _check(folders)
    target = Path(out) if out is not None else _usual_place(folders)
    _check_place(target)
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    problems: list[str] = []
    demo = _demo([*folders, target.parent], problems)
    # A surrogate that stands alone in some caption has no UTF-8 form.
    content = page(runs, demo, problems).encode("utf-8", errors="replace")
    partial = target.with_name(f"{target.name}.partial")
    partial.write_bytes(content)
    partial.replace(target)
    return target


def main(argv: list[str]) -> int:
    """Exit status: 0 the page is there, 2 a mistake in the call, or a page that can not be written there."""
    parser = argparse.ArgumentParser(prog="synpo-fast report", description="Writes a run's report, or compares runs.")
    parser.add_argument("runs", metavar="DIR", nargs="+", type=Path, help="output_dir of a run; several are compared")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: report.html in DIR, or in what DIRs share")
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
        raise UserError("no run's folder was given")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the output_dir of a run")
        if not any((folder / name).exists() for name in LEFT_BY_RUNS):
            raise UserError(f"{folder} holds no run (no {', no '.join(LEFT_BY_RUNS)}): give the output_dir of a run")
    places = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]
    if twice:
        raise UserError(f"one folder is given more than once: {', '.join(twice)}")


def _check_place(target: Path) -> None:
    """Only a page of ours is replaced: --out may be a slip of the hand that names a file of another kind."""
    if target.is_dir():
        raise UserError(f"the page can not be written to {target}: it is a folder")
    if target.exists() and not (target.suffix.lower() in (".html", ".htm") and _is_report(target)):
        raise UserError(f"{target} exists and is no report of synpo-fast: remove it, or name another place with --out")


def _is_report(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as page:
        head = page.read(HEAD_BYTES)
    return not head or (head.startswith(BEGINS) and TITLE_ENDS in head)


def _usual_place(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / NAME
    parents = {folder.resolve().parent for folder in folders}
    return Path(os.path.relpath(parents.pop())) / NAME if len(parents) == 1 else Path(NAME)


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of their paths, as few as tell all runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError(f"the same folder twice: {folders}")


def _demo(places: Sequence[Path], problems: list[str]) -> tuple[dict[str, Any], Path] | None:
    """demo.json of the first place that has one: a run's folder, or where the page is written."""
    for place in places:
        if (place / "demo.json").exists():
            found = read_json_object(place / "demo.json", problems)
            return None if found is None else (found, place.resolve())
    return None
