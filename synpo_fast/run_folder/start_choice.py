"""Chooses the checkpoint that a run starts from, and prepares an output folder that an earlier run used.

No file of an earlier run is deleted or overwritten, except with `--overwrite_output_dir`, which deletes only files that runs
write. A start that replaces something moves it into `superseded/` first: checkpoints that are not whole, metrics and skipped
pairs of steps that will be run again, the report of another run. The config of an earlier start is kept beside the new one.
The process that holds the folder's lock does this after model and data are loaded, so a mistake in the options changes
nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from synpo_fast.config.sources import read_yaml
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.run_folder.best_files import check_top_is_free
from synpo_fast.run_folder.checkpoint import (
    checkpoint_problem,
    is_ours,
    list_checkpoints,
    newest_and_broken,
    step_of_checkpoint,
    why_no_folder,
)
from synpo_fast.run_folder.overwriting import (
    CONFIG,
    FILES_OF_ONE_RUN,
    METRICS,
    RESUMED_FROM,
    SKIPPED,
    check_inputs_stay,
    remove_earlier_run,
)
from synpo_fast.run_folder.superseded import FOLDER, free_name, set_aside, set_aside_lines

LOCATION_OPTIONS = ("output_dir", "run_name")  # a run that is moved or renamed is still the same run
RESUMABLE = "a checkpoint-N folder, a run's folder (its newest whole checkpoint is taken), or auto"
START_OVER = "start over with --overwrite_output_dir (which deletes that run) or in another output_dir"


@dataclass(frozen=True)
class Start:
    """The start of a run.

    checkpoint: to resume from; None: begin at step 0. broken: later checkpoints that are not whole, each with its problem.
    notes: lines that tell the user how the checkpoint was chosen.
    """

    checkpoint: Path | None = None
    broken: list[tuple[Path, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def in_folder_of(self, config: TrainConfig) -> bool:
        """True if the checkpoint is from output_dir itself, so that the run of that folder continues."""
        return self.checkpoint is not None and _lies_in(self.checkpoint, Path(config.output_dir))


def choose_start(config: TrainConfig) -> Start:
    """Returns the start that the options ask for; changes no file.

    Raises UserError if the checkpoint cannot be used, or if an earlier run would lose something.
    """
    check_inputs_stay(config)
    folder = Path(config.output_dir)
    start = Start()
    if config.resume == "auto":
        start = _newest_start(folder)
    elif config.resume is not None:
        start = _named_start(config, folder, Path(config.resume))
    elif (found := list_checkpoints(folder)) and not config.overwrite_output_dir:
        _refuse_others(folder, found)
        raise UserError(
            f"output_dir={config.output_dir!r} holds checkpoints: continue with --resume auto, or {START_OVER}"
        )
    if config.load_best_model_at_end:
        check_top_is_free(folder, may_replace=config.overwrite_output_dir or start.in_folder_of(config))
    return start


def _newest_start(folder: Path) -> Start:
    newest, broken = newest_and_broken(folder)
    if newest is None and broken:
        _refuse_others(folder, [each for each, _ in broken])
        reasons = "; ".join(f"{each.name}: {problem}" for each, problem in broken)
        count = "its only checkpoint" if len(broken) == 1 else f"none of its {len(broken)} checkpoints"
        raise UserError(
            f"resume=auto: output_dir={str(folder)!r} holds a run, but {count} "
            f"{'is not whole' if len(broken) == 1 else 'is whole'} ({reasons}). Restore what is missing, or {START_OVER}"
        )
    if newest is None:
        return _start_from_origin(folder) or Start(notes=(_note_for_step_0(folder),))
    return Start(newest, broken)


def _note_for_step_0(folder: Path) -> str:
    last = max((step for step in _steps_of(folder / METRICS) if step < math.inf), default=None)
    kept = "" if last is None else f"; {METRICS} has lines up to step {last:g}, which are kept"
    return f"no checkpoint in {folder}: starting at step 0{kept}"


def _steps_of(file: Path) -> Iterator[float]:
    if file.is_file():
        with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            yield from map(step_of_line, stream)


def _start_from_origin(folder: Path) -> Start | None:
    """Returns a start from the checkpoint in another folder that this folder's run was resumed from, or None.

    It is used while this folder has no checkpoint of its own. Raises UserError if that checkpoint is lost.
    """
    try:
        name = json.loads((folder / RESUMED_FROM).read_text(encoding="utf-8"))["checkpoint"]
        problem = checkpoint_problem(Path(name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"resume=auto: {folder / RESUMED_FROM} cannot be read, so the checkpoint that this folder's run was resumed from is "
            f"unknown: name it with --resume, or {START_OVER}"
        ) from None
    if problem is not None:
        raise UserError(
            f"resume=auto: output_dir={str(folder)!r} holds no checkpoint of its own, and its run was resumed from "
            f"{name}, which cannot be used ({problem}): restore it, name another with --resume, or {START_OVER}"
        )
    return Start(Path(name), notes=(f"no checkpoint in {folder} yet: resuming from {name} again",))


def record_origin(folder: Path, start: Start) -> None:
    """Records which checkpoint of another folder a run resumes from, so that `auto` finds it until this folder has its own."""
    assert start.checkpoint is not None
    partial = folder / f"{RESUMED_FROM}.partial"
    partial.write_text(json.dumps({"checkpoint": str(start.checkpoint.absolute())}) + "\n", encoding="utf-8")
    partial.replace(folder / RESUMED_FROM)


def _refuse_others(folder: Path, found: list[Path]) -> None:
    """Raises UserError if no checkpoint was written by this trainer: Hugging Face's writes checkpoint-N folders too."""
    if all(each.is_dir() and not is_ours(each) for each in found):
        what = "which was" if len(found) == 1 else "which were"
        raise UserError(
            f"output_dir={str(folder)!r} holds {', '.join(each.name for each in found)}, {what} not written by this trainer: "
            "give another output_dir, or move them away; --overwrite_output_dir starts here and leaves them unchanged"
        )


def _lies_in(checkpoint: Path, folder: Path) -> bool:
    """True if the checkpoint is in the folder, by whatever path, or if the folder holds a link to it."""
    return folder.resolve() in (checkpoint.resolve().parent, checkpoint.parent.resolve())


def _named_start(config: TrainConfig, folder: Path, found: Path) -> Start:
    if (instead := why_no_folder(found)) is not None:
        raise UserError(f"resume={config.resume!r} {instead}: give {RESUMABLE}")
    problem = checkpoint_problem(found)
    if problem is not None:
        raise UserError(f"cannot resume from {found}: {problem}. Give another one: {RESUMABLE}")
    if not _lies_in(found, folder):
        if list_checkpoints(folder):
            raise UserError(
                f"resume={config.resume!r} is in another folder, and output_dir={config.output_dir!r} holds checkpoints of "
                f"its own: continue from those with --resume auto, or {START_OVER}"
            )
        return Start(found)
    later = [each for each in list_checkpoints(folder) if _step_in_name(each) > (step_of_checkpoint(found) or 0)]
    problems = [(each, checkpoint_problem(each)) for each in reversed(later)]
    whole = [each.name for each, problem in problems if problem is None]
    if whole:
        raise UserError(
            f"resume={config.resume!r}: {config.output_dir!r} holds later checkpoints, {whole[0]} the last, which would be "
            "mixed up with this run's. Move them away, or give another output_dir"
        )
    return Start(found, [(each, problem) for each, problem in problems if problem is not None])


def prepare_run_folder(config: TrainConfig, start: Start, *, steps_done: int, config_text: str) -> list[str]:
    """Prepares the output folder for this run, which has done `steps_done` steps. Returns lines that tell the user what changed.

    Only one process calls it, before any process writes metrics into the folder.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir:
        remove_earlier_run(folder, keep_reference=config.needs_reference and config.reference_kind == "precomputed")
    broken = [each for each, _ in start.broken if is_ours(each)]
    notes = [f"{each.name} was not whole and was moved to {_relative(folder, set_aside(each))}" for each in broken]
    continues = start.in_folder_of(config)
    if start.checkpoint is not None and not continues:
        record_origin(folder, start)
    notes += _set_aside_steps(folder, steps_done + 1 if continues else 0)
    if not continues:
        notes += [
            f"{name} of an earlier run was moved to {_relative(folder, set_aside(folder / name))}"
            for name in (*FILES_OF_ONE_RUN, *((RESUMED_FROM,) if start.checkpoint is None else ()))
            if (folder / name).exists()
        ]
    notes += _keep_config(folder, start, steps_done, config_text, keeps=not config.overwrite_output_dir)
    return notes


def what_changed(earlier: Path, new: Path) -> list[str]:
    """Returns a line for each option that differs between the config.yaml of an earlier start and that of this start."""
    try:
        was, now = read_yaml(earlier), read_yaml(new)
    except (ValueError, OSError) as error:
        return [f"the options that changed since the earlier start are unknown: {error}"]
    names = [name for name in now if name in was and was[name] != now[name] and name not in LOCATION_OPTIONS]
    return [f"changed: {name} was {_shown(was[name])}, is {_shown(now[name])}" for name in names]


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _set_aside_steps(folder: Path, first_step: int) -> list[str]:
    """Moves lines about steps that will be run again into superseded/, those of all ranks. Returns lines for the user."""
    notes = []
    for file in [folder / METRICS, *sorted(folder.glob(SKIPPED))]:
        count = set_aside_lines(file, lambda line: step_of_line(line) < first_step)
        if count:
            plural = "s" if count > 1 else ""
            notes.append(f"{count} line{plural} of {file.name} from step {first_step} on moved to {FOLDER}/{file.name}")
    if notes and (folder / "report.html").exists():  # it shows the steps that will be run again
        notes.append(f"report.html was moved to {_relative(folder, set_aside(folder / 'report.html'))}")
    return notes


def step_of_line(line: str) -> float:
    """Returns the step of a line of metrics; infinity if the line is cut off, so that it is not kept."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return math.inf


def _keep_config(folder: Path, start: Start, step: int, text: str, *, keeps: bool) -> list[str]:
    """Writes config.yaml. An earlier config.yaml with other content is renamed first. Returns lines for the user."""
    file, notes = folder / CONFIG, []
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(text, encoding="utf-8")
    if start.checkpoint is not None:
        notes += what_changed(start.checkpoint.parent / CONFIG, partial)
    if keeps and file.exists() and file.read_bytes() != text.encode():
        kept = free_name(folder / f"config.until-step-{step}.yaml")
        file.rename(kept)
        notes.append(f"the earlier config.yaml is now {kept.name}")
    partial.replace(file)
    return notes


def _step_in_name(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
