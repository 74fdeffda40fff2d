"""The model files of a run's best checkpoint at the top of its output folder, where Hugging Face's tools look for a model.

They are copies: the checkpoint stays as it is, and resuming never reads them. best_model.json, which is written last, names
them, so that a later run of the same folder may replace these files, and no others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.training.checkpoint import COMPLETE, CheckpointError, what_is_broken

NAME = "best_model.json"
LEFT_OUT = {COMPLETE, "README.md"}  # a model card of peft's, which says nothing of this run
# What makes transformers or peft take a folder for a model.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "pytorch_model*.bin")


def put_best(output_dir: Path, checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Copies the checkpoint's model files to the top of output_dir; does nothing where they are there already.

    facts go into best_model.json: step, metric, value. Raises CheckpointError if the checkpoint is not whole, if a file of
    somebody else's is in the way, and where the copies can not be written; the checkpoint itself is whole in the latter two.
    """
    if _is_there(output_dir, facts):
        return
    problem = what_is_broken(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(f"the best model can not be taken from {checkpoint}: {problem}")
    names = sorted(file.name for file in checkpoint.iterdir() if file.is_file() and file.name not in LEFT_OUT)
    earlier = _files_of(output_dir)
    foreign = [name for name in names if name not in earlier and (output_dir / name).exists()]
    if foreign:
        raise CheckpointError(
            f"{output_dir} holds {', '.join(foreign)}, which this run did not write: the best model stays in {checkpoint}"
        )
    partial = output_dir / f"{NAME}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in names:
            shutil.copyfile(checkpoint / name, partial / name)
        (partial / NAME).write_text(
            json.dumps({**facts, "checkpoint": checkpoint.name, "files": names}, indent=1) + "\n"
        )
        _write_names(output_dir, {*earlier, *names})  # both, until all is in its place
        for name in names:
            (partial / name).replace(output_dir / name)
        for name in set(earlier) - set(names):
            (output_dir / name).unlink(missing_ok=True)
        (partial / NAME).replace(output_dir / NAME)
        partial.rmdir()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"the best model, {checkpoint}, could not be copied to {output_dir}: {error}") from error


def check_place(output_dir: Path, *, may_replace: bool) -> None:
    """Raises UserError where the top of output_dir holds a model that this run would have to overwrite at its end.

    may_replace: the files that best_model.json names are this run's, or are to be deleted.
    """
    ours = _files_of(output_dir)
    if ours and not may_replace:
        raise UserError(
            f"output_dir={str(output_dir)!r} holds the best model of an earlier run ({NAME}): start anew with "
            "--overwrite_output_dir, or take another folder"
        )
    found = sorted({file.name for pattern in MODEL_FILES for file in output_dir.glob(pattern)} - set(ours))
    if found:
        raise UserError(
            f"output_dir={str(output_dir)!r} holds a model ({', '.join(found)}), and load_best_model_at_end puts one there: "
            "take another folder"
        )


def remove_best(output_dir: Path) -> None:
    """Deletes the copies that best_model.json names, and it."""
    for name in _files_of(output_dir):
        (output_dir / name).unlink(missing_ok=True)
    (output_dir / NAME).unlink(missing_ok=True)
    shutil.rmtree(output_dir / f"{NAME}.partial", ignore_errors=True)


def _is_there(output_dir: Path, facts: Mapping[str, Any]) -> bool:
    found = _read(output_dir)
    same = bool(found.get("files")) and all(found.get(name) == value for name, value in facts.items())
    return same and all((output_dir / name).is_file() for name in _files_of(output_dir))


def _files_of(output_dir: Path) -> list[str]:
    files = _read(output_dir).get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return [name for name in names if name not in ("", ".", "..") and Path(name).name == name]


def _write_names(output_dir: Path, names: set[str]) -> None:
    partial = output_dir / f"{NAME}.names"
    partial.write_text(json.dumps({"files": sorted(names)}, indent=1) + "\n")
    partial.replace(output_dir / NAME)


def _read(output_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((output_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
