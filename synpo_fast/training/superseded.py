"""A run's folder `superseded/`: what a later start replaced is moved here, so that no start loses an earlier run's work."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

FOLDER = "superseded"


def set_aside(path: Path, *, name: str | None = None) -> Path:
    """Moves a file or folder from a run's folder into `superseded/`; returns where it lies now. One rename: all or nothing.

    name: there; default: its own. Where the name is taken a number is added.
    """
    place = path.parent / FOLDER
    place.mkdir(exist_ok=True)
    target = free_name(place / (name or path.name))
    path.rename(target)
    return target


def set_aside_lines(file: Path, keeps: Callable[[str], bool]) -> int:
    """Moves the lines that `keeps` refuses to the end of the file of the same name in `superseded/`; returns their number.

    They are on the disk there before they go here: a kill in between leaves them in both.
    """
    if not file.exists():
        return 0
    with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        lines = list(stream)
    ended = [line if line.endswith("\n") else f"{line}\n" for line in lines]  # more lines are to follow the last one
    kept = [line for line in ended if keeps(line)]
    if kept == lines:
        return 0
    taken = [line for line in ended if not keeps(line)]
    if taken:
        (file.parent / FOLDER).mkdir(exist_ok=True)
        _write(file.parent / FOLDER / file.name, taken, mode="a")
    partial = file.with_name(f"{file.name}.partial")
    _write(partial, kept, mode="w")
    partial.replace(file)
    return len(taken)


def free_name(path: Path) -> Path:
    """The path, or with a number before its suffix the first one that is not taken."""
    if not os.path.lexists(path):
        return path
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(2))
    return next(each for each in numbered if not os.path.lexists(each))


def _write(file: Path, lines: list[str], *, mode: str) -> None:
    with file.open(mode, encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        stream.writelines(lines)
        stream.flush()
        os.fsync(stream.fileno())
