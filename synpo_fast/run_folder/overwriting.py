"""`--overwrite_output_dir`: which files of an earlier run it deletes, and the looks before the first of them goes.

What can be known to be wrong is said while everything is still there: a file that this very run reads is among them, or a
folder in it cannot be written. config.yaml is not among them: the one of this start takes its place in one move.
"""

from __future__ import annotations

import os
from pathlib import Path

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.row_folders import named_split
from synpo_fast.errors import UserError
from synpo_fast.run_folder.best_files import MODEL_FILES, _files_of, remove_best
from synpo_fast.run_folder.checkpoint import remove_checkpoints, removed_checkpoints
from synpo_fast.run_folder.superseded import FOLDER, delete

READ = ("model_name_or_path", "train_file", "eval_file", "video_root", "deepspeed", "feature_cache")
CONFIG, METRICS, SKIPPED, REFERENCE = "config.yaml", "metrics.jsonl", "skipped_pairs.rank*.jsonl", "reference.pt"
CAME_FROM = "resumed_from.json"  # names the checkpoint in another folder that this folder's run went on from
OF_ONE_RUN = ("report.html", "tensorboard", "wandb_run_id")  # a new run begins its own
DELETED = ("config.until-step-*.yaml", METRICS, SKIPPED, CAME_FROM, *OF_ONE_RUN, "profile.json", "wandb", FOLDER)


def check_inputs_stay(config: TrainConfig, *, config_file: str | None = None) -> None:
    """Raises UserError where overwrite_output_dir would delete what this run reads."""
    if not config.overwrite_output_dir:
        return
    folder = Path(config.output_dir)
    deleted = {_place(path): path for path in _to_delete(folder, keep_reference=False)}
    given = {name: getattr(config, name) for name in READ} | {"config": config_file}
    for option, value in given.items():
        if value is None:
            continue
        path = Path(named_split(value)[0]) if option.endswith("_file") else Path(value)
        paths = [path]
        if option == "model_name_or_path":  # the folder may stay and its weights go, as those of a best model do
            paths += [file for pattern in MODEL_FILES for file in path.glob(pattern)]
        for each in paths:
            gone = next((deleted[place] for place in _way_to(each) if place in deleted), None)
            if gone is not None:
                raise UserError(
                    f"--overwrite_output_dir would delete {gone}, which {option}={value!r} reads: move what this run reads out "
                    "of output_dir, or give another output_dir"
                )


def remove_earlier_run(folder: Path, *, keep_reference: bool) -> None:
    """Deletes what runs write, and nothing else. keep_reference: log-probs that this run has made or found to be right."""
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
            f"--overwrite_output_dir: {where} cannot be deleted ({error.strerror or error}): what was deleted before is gone"
        ) from error


def _to_delete(folder: Path, *, keep_reference: bool) -> list[Path]:
    checkpoints, left_over = removed_checkpoints(folder)
    best = [folder / name for name in _files_of(folder)]
    patterns = (*DELETED, *(() if keep_reference else (REFERENCE,)))
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return [*checkpoints, *left_over, *(path for path in best if os.path.lexists(path)), *found]


def _check_deletable(path: Path) -> None:
    """Raises UserError, naming what bars the way, as far as that can be known beforehand."""
    folders = [path.parent]
    if path.is_dir() and not path.is_symlink():
        folders += [Path(name) for name, _, _ in os.walk(path)]
    for each in folders:
        if not os.access(each, os.W_OK | os.X_OK):
            raise UserError(
                f"--overwrite_output_dir: {path} cannot be deleted, since {each} may not be written: nothing was deleted"
            )
        if each != path.parent and os.path.ismount(each):
            raise UserError(
                f"--overwrite_output_dir: {path} cannot be deleted, since {each} is a disk of its own: nothing was deleted"
            )


def _way_to(path: Path) -> list[Path]:
    """The path and the folders it lies in, by the name given and by the one that its links lead to."""
    ways = (path.absolute(), path.resolve())
    return [_place(each) for way in ways for each in (way, *way.parents)]


def _place(path: Path) -> Path:
    """The place of a name, whatever links its folder is reached by; the name itself may be a link."""
    return path.parent.resolve() / path.name
