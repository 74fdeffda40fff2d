"""`--overwrite_output_dir`: deletes the files of an earlier run, after checks.

The checks raise an error before anything is deleted: if this run reads one of the files, or if a folder cannot be written.
config.yaml is not deleted: this start's config.yaml replaces it in one rename.
"""

from __future__ import annotations

import os
from pathlib import Path

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.row_folders import named_split
from synpo_fast.errors import UserError
from synpo_fast.run_folder.best_files import MODEL_FILES, listed_files, remove_best
from synpo_fast.run_folder.checkpoint import remove_checkpoints, removed_checkpoints
from synpo_fast.run_folder.superseded import FOLDER, delete

INPUT_OPTIONS = ("model_name_or_path", "train_file", "eval_file", "video_root", "deepspeed", "feature_cache")
CONFIG, METRICS, SKIPPED, REFERENCE = "config.yaml", "metrics.jsonl", "skipped_pairs.rank*.jsonl", "reference.pt"
RESUMED_FROM = "resumed_from.json"  # names the checkpoint in another folder that this folder's run was resumed from
FILES_OF_ONE_RUN = ("report.html", "tensorboard", "wandb_run_id")  # a new run writes its own
DELETED = (
    "config.until-step-*.yaml",
    METRICS,
    SKIPPED,
    RESUMED_FROM,
    *FILES_OF_ONE_RUN,
    "profile.json",
    "wandb",
    FOLDER,
)


def check_inputs_stay(config: TrainConfig, *, config_file: str | None = None) -> None:
    """Raises UserError if overwrite_output_dir would delete a file that this run reads."""
    if not config.overwrite_output_dir:
        return
    folder = Path(config.output_dir)
    deleted = {_with_folders_resolved(path): path for path in _to_delete(folder, keep_reference=False)}
    given = {name: getattr(config, name) for name in INPUT_OPTIONS} | {"config": config_file}
    for option, value in given.items():
        if value is None:
            continue
        path = Path(named_split(value)[0]) if option.endswith("_file") else Path(value)
        paths = [path]
        if option == "model_name_or_path":  # weights may be deleted although their folder stays, as a best model's are
            paths += [file for pattern in MODEL_FILES for file in path.glob(pattern)]
        for each in paths:
            gone = next((deleted[place] for place in _names_and_parents(each) if place in deleted), None)
            if gone is not None:
                raise UserError(
                    f"--overwrite_output_dir would delete {gone}, which {option}={value!r} reads: move that file or folder "
                    "out of output_dir, or give another output_dir"
                )


def remove_earlier_run(folder: Path, *, keep_reference: bool) -> None:
    """Deletes the files that runs write, and nothing else.

    keep_reference: keeps reference.pt, whose log-probs this run has computed or found valid. Raises UserError if a file cannot
    be deleted; what can be checked is checked before the first deletion.
    """
    paths = _to_delete(folder, keep_reference=keep_reference)
    for path in paths:
        _check_deletable(path)
    try:
        remove_checkpoints(folder)
        remove_best(folder)
        for path in paths:
            delete(path)
    except OSError as error:
        where = error.filename or folder
        raise UserError(
            f"--overwrite_output_dir: {where} cannot be deleted ({error.strerror or error}); other files were deleted before it"
        ) from error


def _to_delete(folder: Path, *, keep_reference: bool) -> list[Path]:
    checkpoints, left_over = removed_checkpoints(folder)
    best = [folder / name for name in listed_files(folder)]
    patterns = (*DELETED, *(() if keep_reference else (REFERENCE,)))
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return [*checkpoints, *left_over, *(path for path in best if os.path.lexists(path)), *found]


def _check_deletable(path: Path) -> None:
    """Raises UserError, naming the obstacle, if it can be known beforehand that the path cannot be deleted."""
    folders = [path.parent]
    if path.is_dir() and not path.is_symlink():
        folders += [Path(name) for name, _, _ in os.walk(path)]
    for each in folders:
        if not os.access(each, os.W_OK | os.X_OK):
            raise UserError(
                f"--overwrite_output_dir: {path} cannot be deleted, since {each} is not writable: nothing was deleted"
            )
        if each != path.parent and os.path.ismount(each):
            raise UserError(
                f"--overwrite_output_dir: {path} cannot be deleted, since {each} is a mount point: nothing was deleted"
            )


def _names_and_parents(path: Path) -> list[Path]:
    """Returns the path and all folders above it, both by the given name and with links resolved."""
    names = (path.absolute(), path.resolve())
    return [_with_folders_resolved(each) for name in names for each in (name, *name.parents)]


def _with_folders_resolved(path: Path) -> Path:
    """Returns the path with links in its folders resolved; the last name itself may be a link."""
    return path.parent.resolve() / path.name
