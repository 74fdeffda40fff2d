"""Shared parts of all importers: a row that records which of its keys were used, and the rules for prompts and videos."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any

from synpo_fast.data.manifest import relative_path
from synpo_fast.data.pair import Pair

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif", ".3gp", ".ogv"]
)


WORDS = {"rejected": ("first", "all"), "system": ("refuse", "fold", "drop"), "responses": ("pair", "all")}


class Refused(ValueError):
    """Raised for a row that is not imported. Rows are counted by reason; detail differs from row to row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class SourceRow:
    """One row of the source. A null value counts as a missing key."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = {key: value for key, value in content.items() if value is not None}
        self.used: set[str] = set()
        self.left: set[str] = set()

    @property
    def unused(self) -> set[str]:
        """Keys that the importer did not use. Keys inside turns are given by path: "prompt.content.fps"."""
        return (self.content.keys() - self.used) | self.left

    def get(self, key: str) -> Any:
        self.used.add(key)
        return self.content.get(key)

    def leave(self, place: str, part: dict[str, Any], *used: str) -> None:
        """Records the keys of an object inside the row that are not in `used`. Null and "" are ignored."""
        self.left |= {f"{place}.{key}" for key, value in part.items() if key not in used and value not in (None, "")}

    def text(self, key: str) -> str:
        value = self.get(key)
        if value is None:
            raise Refused(f"no {key}")
        if not isinstance(value, str):
            raise Refused(f"{key} is not text", f"{value!r:.60}")
        return value

    def number(self, key: str) -> float | None:
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise Refused(f"{key} is not a number", f"{value!r:.60}")
        return value

    def id(self, key: str = "id") -> str:
        """The row's id; "" if it has none. The id is then made from file name and row."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            raise Refused(f"{key} is neither text nor a whole number", f"{value!r:.60}")
        return "" if value is None else str(value).strip()

    def numbers(self, key: str, count: int) -> list[float | None]:
        """A list of `count` numbers. An entry that is null, text or not finite becomes None."""
        values = self.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise Refused(f"{key} is not a list of {count} numbers", f"{values!r:.60}")
        real = [not isinstance(each, bool) and isinstance(each, (int, float)) and isfinite(each) for each in values]
        return [float(each) if good else None for each, good in zip(values, real, strict=True)]

    def refuse(self, *keys: str, because: str) -> None:
        """Refuses the row if one of the keys is not empty: the importer does not support what it means."""
        for key in keys:
            if self.get(key):
                raise Refused(f"has {key}: {because}")


@dataclass(frozen=True)
class ImportOptions:
    """Options of an import.

    video_root: the folder of the videos. It is needed for absolute paths and for names without a suffix. If given, every video
        must exist.
    rejected: for several rejected responses in a row, "first" makes one pair and "all" makes one pair for each.
    system: "refuse" a row with a system message, "fold" the message into the prompt (before it, with an empty line between), or
        "drop" it.
    responses: for several scored answers in a row, "pair" makes a pair of the best and the worst, and "all" keeps them as
        responses.
    """

    video_root: Path | None = None
    rejected: str = "first"
    system: str = "refuse"
    responses: str = "pair"

    def __post_init__(self) -> None:
        for name, allowed in WORDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.video_root is not None and not self.video_root.is_dir():
            raise ValueError(f"video_root {self.video_root} is not a folder")

    def video(self, name: object) -> str:
        """The row's name of its video as a path relative to the root."""
        if isinstance(name, dict) and name.keys() <= {"path", "bytes"}:  # a Video column of Hugging Face datasets
            if name.get("bytes") is not None:
                raise Refused("the video is stored inside the row; only paths are imported")
            name = name.get("path")
        if isinstance(name, list) and len(name) == 1:
            name = name[0]
        if isinstance(name, list):
            raise Refused("several videos in a row: a pair shows only one")
        if not isinstance(name, str) or not name.strip():
            raise Refused("the video is not named by a path", f"{name!r:.60}")
        if "://" in name:
            raise Refused("the video is an address, not a file", name)
        path = self._below_root(name)
        try:
            path = relative_path("video", path)
        except ValueError as error:
            raise Refused("unusable video path", str(error)) from error
        return path if self.video_root is None else self._existing(path)

    def _below_root(self, name: str) -> str:
        if not PurePosixPath(name).is_absolute():
            return PurePosixPath(name).as_posix()  # removes "./" and "//"
        if self.video_root is None:
            raise Refused("the video path is absolute: give the video root", name)
        for root in (self.video_root.absolute(), self.video_root.resolve()):
            if PurePosixPath(name).is_relative_to(root.as_posix()):
                return PurePosixPath(name).relative_to(root.as_posix()).as_posix()
        raise Refused("the video path is outside the video root", name)

    def _existing(self, path: str) -> str:
        assert self.video_root is not None
        if os.path.exists(self.video_root / path):
            return path
        found = self._by_name.get(path, [])
        if len(found) > 1:
            raise Refused("several files have the name of the video", f"{path}: {', '.join(sorted(found)[:3])}")
        if not found:
            raise Refused("the video is not below the video root", path)
        return found[0]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Video files by path without suffix and by stem. The folder is walked once, not once per row."""
        assert self.video_root is not None
        names: dict[str, list[str]] = {}
        for folder, _, files in os.walk(self.video_root):
            for file in files:
                path = PurePosixPath(Path(folder, file).relative_to(self.video_root).as_posix())
                if path.suffix.lower() in VIDEO_SUFFIXES:
                    for name in {path.with_suffix("").as_posix(), path.stem}:
                        names.setdefault(name, []).append(path.as_posix())
        return names


def clean_prompt(text: str, *, num_videos: int, tags: Sequence[str] = ("<video>",), system: str = "") -> str:
    """Removes the tag of the video from the prompt. More tags than videos, and tags of other media, are refused.

    system: a text to put before the prompt, with an empty line between.
    """
    for tag in ("<video>", "<image>", "<audio>"):
        if tag not in tags and tag in text:
            raise Refused(f"{tag} in the prompt")
    count = sum(text.count(tag) for tag in tags)
    if count > num_videos:
        raise Refused("more tags than videos in the prompt", f"{count} for {num_videos}")
    for tag in tags:
        before, found, after = text.partition(tag)
        if found:
            text = before + (after.removeprefix("\n") if not before.strip() else after)
    return f"{system}\n\n{text.strip()}" if system else text.strip()


def make_pair(**fields: Any) -> Pair:
    """Makes a Pair. Raises Refused with Pair's reason if the fields are not valid."""
    name = f"pair {fields.get('id', '')!r}: "
    try:
        return Pair(**fields)
    except ValueError as error:
        raise Refused(str(error).removeprefix(name)) from error
