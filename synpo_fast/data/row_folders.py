"""Finds the files of a folder that hold the rows of one split. Several splits are never mixed.

Three kinds of folders are known. The first is written by datasets.save_to_disk, with or without splits. The second has the
layout of data sets on the Hugging Face hub: Parquet, JSON Lines or CSV, in files or folders named after their split
(train-00000-of-00002.parquet, data/test-*.parquet, validation/). The third is a plain folder of such files that name no split.
FOLDER:SPLIT selects one of several splits.
"""

import json
import re
from pathlib import Path

from synpo_fast.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
PATTERNS = ("data-*.arrow", "*.parquet", "*.jsonl", "*.csv")  # the first pattern that matches any file is used
NO_SPLIT = "no split named"


def named_split(path: str | Path) -> tuple[Path, str]:
    """Returns (folder, split) of FOLDER:SPLIT; for any other path, the path itself and ""."""
    folder, colon, split = str(path).rpartition(":")
    if colon and split and not Path(path).exists() and Path(folder).is_dir():
        return Path(folder), split
    return Path(path), ""


def split_files(folder: Path, split: str = "") -> list[Path]:
    """The files with the folder's rows, in order. Raises ValueError if there are several splits and none is named."""
    splits = _splits(folder)
    names = ", ".join(sorted(splits))
    if split:
        found = splits.get(split) or splits.get(SPLITS.get(split, split))
        if not found:
            known = f"it has {names}" if splits.keys() - {NO_SPLIT} else "its files name no split"
            raise UserError(f"{folder} has no split {split!r}: {known}")
        return found
    if not splits:
        raise UserError(
            f"{folder} is a folder with no {', '.join(PATTERNS[:-1])} or {PATTERNS[-1]} file directly in it"
        )
    if len(splits) > 1:
        sizes = ", ".join(
            f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})" for name, files in sorted(splits.items())
        )
        first = "train" if "train" in splits else next(name for name in sorted(splits) if name != NO_SPLIT)
        raise UserError(f"{folder} holds several splits: {sizes}; name one, as in {folder}:{first}, or give one file")
    ((name, files),) = splits.items()
    # Several Parquet or Arrow files are shards of one data set.
    if name == NO_SPLIT and len(files) > 1 and files[0].suffix in (".jsonl", ".csv"):
        raise UserError(
            f"{folder} holds {len(files)} {files[0].suffix} files that name no split, the first is {files[0].name}: give one file"
        )
    return files


def _splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split."""
    if (folder / "dataset_dict.json").exists():
        parts = sorted(part for part in folder.iterdir() if (part / "state.json").exists())
        return {part.name: _saved_files(part) for part in parts}
    if saved := _saved_files(folder):
        return {NO_SPLIT: saved}
    files = _data_files(folder) or _data_files(folder / "data")
    if not files:
        parts = sorted(part for part in folder.iterdir() if part.is_dir() and _split_of(part.name))
        files = [file for part in parts for file in _saved_files(part) or _data_files(part)]
    found: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(folder).parts[:-1]  # data/, or a folder named after the split
        found.setdefault(_split_of("-".join(inside)) or _split_of(file.stem) or NO_SPLIT, []).append(file)
    return found


def _saved_files(folder: Path) -> list[Path]:
    """The files of a folder that datasets.save_to_disk wrote; [] for any other folder."""
    if not (folder / "state.json").exists():
        return []
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state.get("_indices_data_files"):
        raise UserError(f"{folder} holds a selection of rows: save it again with dataset.flatten_indices()")
    return [folder / part["filename"] for part in state["_data_files"]]


def _data_files(folder: Path) -> list[Path]:
    found = (sorted(folder.glob(pattern)) for pattern in PATTERNS)
    return next((files for files in found if files), [])


def _split_of(name: str) -> str:
    """The split that a file or folder is named after: "train" for train-00000-of-00002 and pairs_train, else ""."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), "")
