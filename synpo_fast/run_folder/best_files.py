"""Copies the model files of a run's best checkpoint to the top of its output folder, where Hugging Face's tools look for a model.

The checkpoint stays as it is, and resuming never reads the copies. best_model.json is written last and lists the copied
files, so that a later run in the same folder may replace these files and no others. If that would lose a model, the model is
moved into `superseded/` first, as a folder that can be loaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import COMPLETE, CheckpointError, checkpoint_problem, has_digests, model_digests
from synpo_fast.run_folder.superseded import FOLDER, set_aside

NAME = "best_model.json"
MOVING = f"{NAME}.earlier"  # a folder that holds an earlier best model while it is moved into superseded/
SELECTION_KEYS = ("metric", "greater_is_better")
NOT_COPIED = {COMPLETE, "README.md"}  # README.md is peft's model card, which says nothing about this run
# transformers and peft take a folder for a model if it holds one of these files.
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "pytorch_model*.bin")


def copy_best(output_dir: Path, checkpoint: Path, facts: Mapping[str, Any]) -> Path | None:
    """Copies the checkpoint's model files to the top of output_dir, unless they are there already.

    facts go into best_model.json: step, metric, greater_is_better, value. An earlier best model is moved into superseded/ if it
    was chosen by another metric or direction, or if no checkpoint holds it any more. Returns its new path, or None.

    Raises CheckpointError if the checkpoint is not whole, if a file that no run wrote has one of the names, or if the copies
    cannot be written. In the last two cases the checkpoint itself is whole.
    """
    if copies_are_intact(output_dir, facts):
        return None
    problem = checkpoint_problem(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(
            f"the best model cannot be taken from {checkpoint}: {problem}. Restore what is missing and start again "
            "with --resume auto; if it is not restored, that start compares evaluations from the beginning"
        )
    names = sorted(file.name for file in checkpoint.iterdir() if file.is_file() and file.name not in NOT_COPIED)
    earlier = listed_files(output_dir)
    foreign = [name for name in names if name not in earlier and os.path.lexists(output_dir / name)]
    if foreign:
        raise CheckpointError(
            f"{output_dir} holds {', '.join(foreign)}, which this run did not write: the best model stays in {checkpoint}. Move "
            "these files away and start again with --resume auto"
        )
    partial = output_dir / f"{NAME}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in names:
            shutil.copyfile(checkpoint / name, partial / name)
        written = {**facts, "checkpoint": checkpoint.name, "files": names, "sealed": model_digests(checkpoint)}
        (partial / NAME).write_text(json.dumps(written, indent=1) + "\n")
        aside = _set_earlier_aside(output_dir, facts)
        earlier = listed_files(output_dir)
        _write_names(output_dir, {*earlier, *names})  # lists old and new files until all are replaced
        for name in names:
            (partial / name).replace(output_dir / name)
        for name in set(earlier) - set(names):
            (output_dir / name).unlink(missing_ok=True)
        (partial / NAME).replace(output_dir / NAME)
        partial.rmdir()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the best model, {checkpoint}, could not be copied to {output_dir}: {error}. Fix that and start again with "
            "--resume auto"
        ) from error
    return aside


def copies_are_intact(output_dir: Path, facts: Mapping[str, Any]) -> bool:
    """True if best_model.json describes the model at the top by these facts, and its files have the bytes that were copied."""
    found = _read(output_dir)
    sealed = found.get("sealed")
    if not isinstance(sealed, dict) or not sealed or any(found.get(name) != value for name, value in facts.items()):
        return False
    try:
        digests = {name: (size, digest) for name, (size, digest) in sealed.items()}
    except (TypeError, ValueError):
        return False
    return has_digests(output_dir, digests) and all((output_dir / name).is_file() for name in listed_files(output_dir))


def is_stored_elsewhere(output_dir: Path, checkpoint: Path) -> bool:
    """True if a copy of the checkpoint's model lies at the top of output_dir or in superseded/. Reads the files there."""
    sealed = model_digests(checkpoint)
    places = [output_dir, *sorted((output_dir / FOLDER).glob("best_model-*"))]
    return bool(sealed) and any((place / NAME).is_file() and has_digests(place, sealed) for place in places)


def check_top_is_free(output_dir: Path, *, may_replace: bool) -> None:
    """Raises UserError if the top of output_dir holds a model that this run would overwrite at its end.

    may_replace: the files that best_model.json lists belong to this run, or will be deleted.
    """
    ours = listed_files(output_dir)
    if ours and not may_replace:
        raise UserError(
            f"output_dir={str(output_dir)!r} holds the best model of an earlier run ({NAME}): start over with "
            "--overwrite_output_dir, or give another folder"
        )
    found = sorted({file.name for pattern in MODEL_FILES for file in output_dir.glob(pattern)} - set(ours))
    if found:
        raise UserError(
            f"output_dir={str(output_dir)!r} holds a model ({', '.join(found)}), and load_best_model_at_end writes one there: "
            "give another folder"
        )


def check_names_are_free(output_dir: Path, names: Iterable[str]) -> None:
    """Raises UserError if a file that no run wrote has one of the names that the best model's files will have."""
    foreign = sorted(
        {name for name in names if os.path.lexists(output_dir / name)} - {*listed_files(output_dir), *NOT_COPIED}
    )
    if foreign:
        raise UserError(
            f"output_dir={str(output_dir)!r} holds {', '.join(foreign)}, and load_best_model_at_end puts files of that name "
            "there: move them away, or give another folder"
        )


def remove_best(output_dir: Path) -> None:
    """Deletes the copies that best_model.json lists, and best_model.json."""
    for name in listed_files(output_dir):
        (output_dir / name).unlink(missing_ok=True)
    (output_dir / NAME).unlink(missing_ok=True)
    for left_over in (f"{NAME}.partial", MOVING):
        shutil.rmtree(output_dir / left_over, ignore_errors=True)


def _set_earlier_aside(output_dir: Path, facts: Mapping[str, Any]) -> Path | None:
    """Moves the best model at the top into superseded/ if it would be lost otherwise; returns its new path, or None.

    The files are moved one by one into a temporary folder, best_model.json last, and then the folder is moved. If the process
    is killed in between, the next start continues from there.
    """
    moving, found = output_dir / MOVING, _read(output_dir)
    if not moving.exists():
        same_rule = all(found.get(name) == facts.get(name) for name in SELECTION_KEYS)
        if "step" not in found or (same_rule and _is_in_a_checkpoint(output_dir, found)):
            return None
        moving.mkdir()
    if not (moving / NAME).exists():
        for name in [*listed_files(output_dir), NAME]:
            if os.path.lexists(output_dir / name):
                (output_dir / name).replace(moving / name)
    step = _read(moving).get("step")
    return set_aside(moving, name=f"best_model-{step if isinstance(step, int) else 0:06d}")


def _is_in_a_checkpoint(output_dir: Path, found: Mapping[str, Any]) -> bool:
    name = found.get("checkpoint")
    checkpoint = output_dir / name if isinstance(name, str) else None
    if checkpoint is None or not checkpoint.is_dir() or checkpoint_problem(checkpoint) is not None:
        return False
    return has_digests(output_dir, model_digests(checkpoint))


def listed_files(output_dir: Path) -> list[str]:
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
