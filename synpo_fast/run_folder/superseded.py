"""A run's folder `superseded/`: what a later start replaced is moved here, so that no start loses an earlier run's work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from synpo_fast.errors import UserError

FOLDER = "superseded"


def set_aside(path: Path, *, name: str | None = None) -> Path:
    """Moves a file or folder from a run's folder into `superseded/`; returns where it lies now. One rename: all or nothing.

    name: there; default: its own. Where the name is taken a number is added. A link still leads where it led.
    """
    target = free_name(_place(path.parent) / (name or path.name))
    if path.is_symlink() and not os.path.isabs(leads_to := os.readlink(path)):
        target.symlink_to(path.parent.absolute() / leads_to)
        path.unlink()
    else:
        path.rename(target)
    return target


def delete(path: Path) -> None:
    """A file, a folder with all in it, or a link without what it leads to. Does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        _append(_place(file.parent) / file.name, taken)
    partial = file.with_name(f"{file.name}.partial")
    try:
        _write(partial, kept, mode="w")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)
    return len(taken)


def free_name(path: Path) -> Path:
    """The path, or with a number before its suffix the first one that is not taken."""
    if not os.path.lexists(path):
        return path
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(2))
    return next(each for each in numbered if not os.path.lexists(each))


def _place(folder: Path) -> Path:
    place = folder / FOLDER
    try:
        place.mkdir(exist_ok=True)
    except FileExistsError:
        what = "a link that leads nowhere" if place.is_symlink() else "a file"
        raise UserError(f"{place} is {what}, and earlier work is kept in a folder of that name: move it away") from None
    return place


def _append(file: Path, lines: list[str]) -> None:
    """All or nothing. Begins a line of its own where the last one was cut off."""
    size = file.stat().st_size if file.exists() else None
    begun = False
    if size:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            begun = stream.read(1) != b"\n"
    try:
        _write(file, ["\n" if begun else "", *lines], mode="a")
    except OSError:
        with suppress(OSError):  # the first error is the one to tell
            if size is None:
                file.unlink(missing_ok=True)
            else:
                os.truncate(file, size)
        raise


def _write(file: Path, lines: list[str], *, mode: str) -> None:
    try:
        with file.open(mode, encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:  # of a write it names no file
        raise OSError(error.errno, error.strerror, str(file)) from error
