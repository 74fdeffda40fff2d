"""The folder of a run: where a run starts from, and what becomes of that which an earlier one left there.

Nothing of an earlier run is deleted or overwritten, except with `--overwrite_output_dir`, and then only what runs write. A
start that replaces something moves it into `superseded/` first: checkpoints that are not whole, metrics and skipped pairs of
steps that are to be run again, the page of another run. The config of an earlier start stays beside the new one. All of
this is done by the process that holds the folder's lock, when model and data are there, so that a mistake in the options
changes nothing.
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
from synpo_fast.run_folder.best_files import check_place
from synpo_fast.run_folder.checkpoint import (
    CheckpointError,
    is_ours,
    list_checkpoints,
    newest_and_broken,
    step_in,
    what_is_broken,
    why_no_folder,
)
from synpo_fast.run_folder.overwriting import (
    CAME_FROM,
    CONFIG,
    METRICS,
    OF_ONE_RUN,
    SKIPPED,
    check_inputs_stay,
    remove_earlier_run,
)
from synpo_fast.run_folder.superseded import FOLDER, free_name, set_aside, set_aside_lines

PLACES = ("output_dir", "run_name")  # where a run lies and what it is called is no change of it
ANEW = "start anew with --overwrite_output_dir (which deletes that run) or in another output_dir"


@dataclass(frozen=True)
class Start:
    """checkpoint: to go on from, None to begin at step 0. broken: later checkpoints, each with what is wrong with it.
    notes: how it was chosen, in lines for the user."""

    checkpoint: Path | None = None
    broken: list[tuple[Path, str]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def in_folder_of(self, config: TrainConfig) -> bool:
        """Whether the run of that very folder goes on."""
        return self.checkpoint is not None and _lies_in(self.checkpoint, Path(config.output_dir))


def choose_start(config: TrainConfig) -> Start:
    """Reads only. Raises ValueError where going on or starting anew would cost an earlier run something."""
    check_inputs_stay(config)
    folder = Path(config.output_dir)
    start = Start()
    if config.resume == "auto":
        start = _newest(folder)
    elif config.resume is not None:
        start = _given(config, folder, Path(config.resume))
    elif (found := list_checkpoints(folder)) and not config.overwrite_output_dir:
        _refuse_others(folder, found)
        raise UserError(f"output_dir={config.output_dir!r} holds checkpoints: go on with --resume auto, or {ANEW}")
    if config.load_best_model_at_end:
        check_place(folder, may_replace=config.overwrite_output_dir or start.in_folder_of(config))
    return start


def _newest(folder: Path) -> Start:
    newest, broken = newest_and_broken(folder)
    if newest is None and broken:
        _refuse_others(folder, [each for each, _ in broken])
        reasons = "; ".join(f"{each.name}: {problem}" for each, problem in broken)
        count = "its only checkpoint" if len(broken) == 1 else f"none of its {len(broken)} checkpoints"
        raise UserError(
            f"resume=auto: output_dir={str(folder)!r} holds a run, but {count} "
            f"{'is not whole' if len(broken) == 1 else 'is whole'} ({reasons}). Put back what is missing, or {ANEW}"
        )
    if newest is None:
        return _came_from(folder) or Start(notes=(_begins_anew(folder),))
    return Start(newest, broken)


def _begins_anew(folder: Path) -> str:
    last = max((step for step in _steps_of(folder / METRICS) if step < math.inf), default=None)
    lines = "" if last is None else f"; {METRICS} has lines up to step {last:g} of a run that saved none: they are kept"
    return f"no checkpoint in {folder}: starting at step 0{lines}"


def _steps_of(file: Path) -> Iterator[float]:
    if file.is_file():
        with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
            yield from map(step_of_line, stream)


def _came_from(folder: Path) -> Start | None:
    """The checkpoint in another folder that a run went on from which has none of its own yet. Raises UserError if it is lost."""
    try:
        name = json.loads((folder / CAME_FROM).read_text(encoding="utf-8"))["checkpoint"]
        problem = what_is_broken(Path(name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"resume=auto: {folder / CAME_FROM} cannot be read, so the checkpoint that this folder's run went on from is not "
            f"known: name it with --resume, or {ANEW}"
        ) from None
    if problem is not None:
        raise UserError(
            f"resume=auto: output_dir={str(folder)!r} holds no checkpoint of its own, and its run went on from {name} "
            f"({problem}): put that back, name another with --resume, or {ANEW}"
        )
    return Start(Path(name), notes=(f"no checkpoint in {folder} yet: going on from {name} once more",))


def note_origin(folder: Path, start: Start) -> None:
    """Keeps which checkpoint of another folder a run goes on from, so that `auto` finds it until there is a checkpoint here."""
    assert start.checkpoint is not None
    partial = folder / f"{CAME_FROM}.partial"
    partial.write_text(json.dumps({"checkpoint": str(start.checkpoint.absolute())}) + "\n", encoding="utf-8")
    partial.replace(folder / CAME_FROM)


def _refuse_others(folder: Path, found: list[Path]) -> None:
    """Raises UserError where no checkpoint is one of this trainer's: Hugging Face's has checkpoint-N folders, too."""
    if all(each.is_dir() and not is_ours(each) for each in found):
        what = "which was" if len(found) == 1 else "which were"
        raise UserError(
            f"output_dir={str(folder)!r} holds {', '.join(each.name for each in found)}, {what} not written by this trainer: "
            "give another output_dir, or move that away; --overwrite_output_dir starts beside it and leaves it as it is"
        )


def _lies_in(checkpoint: Path, folder: Path) -> bool:
    """Under any name, and where the folder holds just a link to it."""
    return folder.resolve() in (checkpoint.resolve().parent, checkpoint.parent.resolve())


def _given(config: TrainConfig, folder: Path, found: Path) -> Start:
    if (instead := why_no_folder(found)) is not None:
        raise UserError(f"resume={config.resume!r} {instead}: give a checkpoint-N folder, or auto")
    problem = what_is_broken(found)
    if problem is not None:
        raise CheckpointError(f"can not resume from {found}: {problem}")
    if not _lies_in(found, folder):
        if list_checkpoints(folder):
            raise UserError(
                f"resume={config.resume!r} is of another folder, and output_dir={config.output_dir!r} holds checkpoints of "
                f"its own: go on from those with --resume auto, or {ANEW}"
            )
        return Start(found)
    later = [each for each in list_checkpoints(folder) if _name_step(each) > (step_in(found) or 0)]
    problems = [(each, what_is_broken(each)) for each in reversed(later)]
    whole = [each.name for each, problem in problems if problem is None]
    if whole:
        raise UserError(
            f"resume={config.resume!r}: {config.output_dir!r} holds later checkpoints, {whole[0]} the last, which would be "
            "taken for this run's. Move them away, or give another output_dir"
        )
    return Start(found, [(each, problem) for each, problem in problems if problem is not None])


def take_over(config: TrainConfig, start: Start, *, steps_done: int, config_text: str) -> list[str]:
    """Makes the folder this run's, which has `steps_done` steps behind it. Returns what to tell the user, a line each.

    One process calls it, before any writes metrics into the folder.
    """
    folder = Path(config.output_dir)
    if config.overwrite_output_dir:
        remove_earlier_run(folder, keep_reference=config.needs_reference and config.reference_kind == "precomputed")
    broken = [each for each, _ in start.broken if is_ours(each)]
    said = [f"{each.name} was not whole and is now {_in(folder, set_aside(each))}" for each in broken]
    goes_on = start.in_folder_of(config)
    if start.checkpoint is not None and not goes_on:
        note_origin(folder, start)
    said += _set_aside_steps(folder, steps_done + 1 if goes_on else 0)
    if not goes_on:
        said += [
            f"{name} of an earlier run is now {_in(folder, set_aside(folder / name))}"
            for name in (*OF_ONE_RUN, *((CAME_FROM,) if start.checkpoint is None else ()))
            if (folder / name).exists()
        ]
    said += _keep_config(folder, start, steps_done, config_text, keeps=not config.overwrite_output_dir)
    return said


def what_changed(earlier: Path, new: Path) -> list[str]:
    """A line for each option that differs between the config.yaml of an earlier start and that of this one."""
    try:
        was, now = read_yaml(earlier), read_yaml(new)
    except (ValueError, OSError) as error:
        return [f"what changed since the earlier start is not known: {error}"]
    names = [name for name in now if name in was and was[name] != now[name] and name not in PLACES]
    return [f"changed: {name} was {_shown(was[name])}, is {_shown(now[name])}" for name in names]


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _set_aside_steps(folder: Path, first_step: int) -> list[str]:
    """Sets aside what was noted of steps that are to be run again, on any number of ranks."""
    said = []
    for file in [folder / METRICS, *sorted(folder.glob(SKIPPED))]:
        count = set_aside_lines(file, lambda line: step_of_line(line) < first_step)
        if count:
            plural = "s" if count > 1 else ""
            said.append(f"{count} line{plural} of {file.name} from step {first_step} on now in {FOLDER}/{file.name}")
    if said and (folder / "report.html").exists():  # it shows those steps
        said.append(f"report.html is now {_in(folder, set_aside(folder / 'report.html'))}")
    return said


def step_of_line(line: str) -> float:
    """A line that a kill has cut off is of no step that is to be kept."""
    try:
        return int(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return math.inf


def _keep_config(folder: Path, start: Start, step: int, text: str, *, keeps: bool) -> list[str]:
    """Writes config.yaml; the one that was there until now, if it says something else, keeps a name of its own."""
    file, said = folder / CONFIG, []
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(text, encoding="utf-8")
    if start.checkpoint is not None:
        said += what_changed(start.checkpoint.parent / CONFIG, partial)
    if keeps and file.exists() and file.read_bytes() != text.encode():
        kept = free_name(folder / f"config.until-step-{step}.yaml")
        file.rename(kept)
        said.append(f"the earlier config.yaml is now {kept.name}")
    partial.replace(file)
    return said


def _name_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _in(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
