"""Resolves a path from a manifest to a file that is safe to open: under its root, existing, not empty, no pipe or device.

Only names and stat are used. No file is opened, because opening a pipe would wait for a writer forever.
"""

import os
import re
import stat
from pathlib import Path

from synpo_fast.data.video.video_info import VideoError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def resolve_video(path: str | Path, root: str | Path | None = None) -> Path:
    """Returns the absolute path of a video file or of a folder of images, with links followed.

    With a root, the path is relative to it, or absolute and under it. It may not leave the root by `..` or by a link. Raises
    VideoError for a path that leaves the root, is missing, unreadable, empty, a pipe, a socket, a device, or a folder
    without images.
    """
    if not str(path) or "\0" in str(path):
        raise VideoError(repr(str(path)), "is not a file name")
    try:
        target = Path(path).resolve() if root is None else _under_root(path, Path(root).resolve())
        mode, size = target.stat().st_mode, target.stat().st_size
    except FileNotFoundError as error:
        raise VideoError(path, "there is no such file" + _where(root)) from error
    except (OSError, RuntimeError) as error:  # no permission, a name too long, a parent that is no folder, a link loop
        raise VideoError(path, f"cannot be reached: {error}") from error
    if stat.S_ISDIR(mode):
        if not image_files(target):
            raise VideoError(path, f"is a folder without images ({', '.join(IMAGE_SUFFIXES)})")
    elif not stat.S_ISREG(mode):
        raise VideoError(path, f"is a {_kind(mode)}, not a file")
    elif size == 0:
        raise VideoError(path, "is empty (0 bytes)")
    return target


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in natural order: frame 2 comes before frame 10."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    parts = re.findall(r"([^0-9]*)([0-9]*)", name.lower())
    return [(text, int(number or -1)) for text, number in parts], name


def _under_root(path: str | Path, root: Path) -> Path:
    if ".." in Path(path).parts:
        raise VideoError(path, f"contains '..'; paths are relative to {root} and may not leave it")
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        how = "is an absolute path" if Path(path).is_absolute() else "follows a link"
        raise VideoError(path, f"{how} to {target}, outside the root {root}")
    return target


def _where(root: str | Path | None) -> str:
    return "" if root is None else f" under {root}"


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
