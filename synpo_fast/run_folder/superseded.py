"""The folder `superseded/` of a run: files that a later start replaces are moved here, so that no earlier work is lost."""

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
    """Moves a file or folder from a run's folder into `superseded/`, in one rename; returns its new path.

    name: its name there; default: unchanged. A number is added if the name is taken. A link keeps its target.
    """
    target = free_name(_superseded_folder(path.parent) / (name or path.name))
    if path.is_symlink() and not os.path.isabs(leads_to := os.readlink(path)):
        target.symlink_to(path.parent.absolute() / leads_to)
        path.unlink()
    else:
        path.rename(target)
    return target


def delete(path: Path) -> None:
    """Deletes a file, a folder with its contents, or a link but not its target. Does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside_lines(file: Path, keeps: Callable[[str], bool]) -> int:
    """Moves the lines for which `keeps` is false to the end of the file of the same name in `superseded/`; returns their number.

    They are written there before they are removed here, so a kill in between leaves them in both files.
    """
    if not file.exists():
        return 0
    with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
        lines = list(stream)
    ended = [line if line.endswith("\n") else f"{line}\n" for line in lines]  # the last line may have no line feed
    kept = [line for line in ended if keeps(line)]
    if kept == lines:
        return 0
    taken = [line for line in ended if not keeps(line)]
    if taken:
        _append(_superseded_folder(file.parent) / file.name, taken)
    partial = file.with_name(f"{file.name}.partial")
    try:
        _write(partial, kept, mode="w")
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(file)
    return len(taken)


def free_name(path: Path) -> Path:
    """Returns the path if it does not exist yet, otherwise the first free path with a number before the suffix."""
    if not os.path.lexists(path):
        return path
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(2))
    return next(each for each in numbered if not os.path.lexists(each))


def _superseded_folder(folder: Path) -> Path:
    place = folder / FOLDER
    try:
        place.mkdir(exist_ok=True)
    except FileExistsError:
        what = "a link that leads nowhere" if place.is_symlink() else "a file"
        raise UserError(f"{place} is {what}, but earlier work is kept in a folder of that name: move it away") from None
    return place


def _append(file: Path, lines: list[str]) -> None:
    """Appends all lines or none. Starts a new line if the file's last line was cut off."""
    size = file.stat().st_size if file.exists() else None
    begun = False
    if size:
        with file.open("rb") as stream:
            stream.seek(-1, os.SEEK_END)
            begun = stream.read(1) != b"\n"
    try:
        _write(file, ["\n" if begun else "", *lines], mode="a")
    except OSError:
        with suppress(OSError):  # the first error is the one to report
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
    except OSError as error:  # an error of write() names no file
        raise OSError(error.errno, error.strerror, str(file)) from error
