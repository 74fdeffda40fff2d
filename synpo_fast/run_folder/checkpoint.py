"""Writes and reads checkpoints. A checkpoint is whole or does not exist.

A checkpoint is written to the folder `checkpoint-N.partial`. Every file is fsynced, sizes and digests are written to
complete.json, and the folder is renamed to `checkpoint-N`; only then older checkpoints are deleted. So if the process is
killed at any moment, or the disk fills up, the last good checkpoint is untouched. A run deletes only checkpoints that it wrote.

    checkpoint-000100/
      adapter_model.safetensors, adapter_config.json      loaded by peft; without an adapter model.safetensors, config.json, ...
      tokenizer and processor files
      state/optimizer.safetensors                         whole tensors by name, which also load with another number of
      state/trainer.json                                  processes or another ZeRO stage
      complete.json                                       sizes and digests of the files that resuming reads

Resuming does not read tokenizer, processor files and README: they may be edited or missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.errors import UserError
from synpo_fast.run_folder.superseded import delete, set_aside

NAME = re.compile(r"checkpoint-(\d+)")
COMPLETE, STATE, CONFIG = "complete.json", "state", "config.json"
STATE_FILES = ("optimizer.safetensors", "trainer.json")
REMOVED = ".removed"  # suffix of a folder that is being deleted
LEFT_OVER = re.compile(rf"checkpoint-\d+(\.partial|(\.partial)?{re.escape(REMOVED)})")
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read. Good checkpoints that existed before still exist."""


def write_checkpoint(
    output_dir: Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    optimizer_state: dict[str, Tensor],
    trainer_state: dict[str, Any],
    keep: int | None,
    best: int | None = None,
    earlier_bests: Sequence[int] = (),
) -> Path:
    """Writes a checkpoint, deletes older ones beyond `keep`, and returns its folder. Only one process calls it.

    save_model writes the model files into the folder that it is given. best: the step of a checkpoint that is not deleted
    while its files are there. earlier_bests: steps of checkpoints that are never deleted.

    Raises CheckpointError if anything cannot be written; the partial folder is then removed.
    """
    final = folder_of(output_dir, step)
    partial = output_dir / f"{final.name}.partial"
    try:
        _remove(partial)
        (partial / STATE).mkdir(parents=True)
        save_model(partial)
        _save_tensors(partial / STATE / "optimizer.safetensors", optimizer_state)
        (partial / STATE / "trainer.json").write_text(json.dumps(trainer_state, indent=1))
        _write_digests(partial)
        if os.path.lexists(final):  # not ours: leftovers of an earlier attempt were moved away when this run began
            logger.warning("%s already existed and was moved to %s", final, set_aside(final))
        partial.rename(final)
        _sync(output_dir)
    except Exception as error:  # safetensors and peft wrap disk errors in types of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}") from error
    kept = {final, *(folder_of(output_dir, each) for each in earlier_bests)}
    if best is not None and _has_all_sizes(folder_of(output_dir, best)):
        kept.add(folder_of(output_dir, best))
    _prune(output_dir, keep, kept=kept, run=trainer_state.get("run"))
    return final


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Returns the newest whole checkpoint. Broken ones are skipped with a warning."""
    newest, broken = newest_and_broken(output_dir)
    for folder, problem in broken:
        logger.warning("skipping %s: %s", folder, problem)
    return newest


def newest_and_broken(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Returns the newest whole checkpoint, and the broken ones after it with their problems, newest first."""
    broken: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(output_dir)):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder, broken
        broken.append((folder, problem))
    return None, broken


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoint-N folders, oldest step first.

    Half-written checkpoints have another name and are left out. Broken links are included: they may lead to a disk that is
    not mounted.
    """
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if NAME.fullmatch(path.name)), key=_step_of)


def why_no_folder(path: Path) -> str | None:
    """Returns the reason why path is not a folder (missing, a file, a broken link), or None if it is one."""
    if path.is_dir():
        return None
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    return "is a file, not a folder" if path.exists() else "is not there"


def checkpoint_problem(folder: Path) -> str | None:
    """Returns the problem with a checkpoint, or None if a run can resume from it. Reads weights and state once."""
    if (instead := why_no_folder(folder)) is not None:
        return instead
    if not is_ours(folder):
        return f"was not written by this trainer (it has no {COMPLETE} and no {STATE}/)"
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        recorded = {name: (size, digest) for name, (size, digest) in files.items() if is_read_on_resume(name)}
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except OSError as error:
        return f"{COMPLETE} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, KeyError):
        return f"{COMPLETE} is empty or cut off"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"{COMPLETE} cannot be read: it does not list files with their sizes and digests"
    missing = {f"{STATE}/{name}" for name in STATE_FILES} - set(recorded)
    if missing or not any(name.endswith(".safetensors") and not name.startswith(STATE) for name in recorded):
        return f"{COMPLETE} names no {', '.join(sorted(missing)) or 'weights'}"
    for name, (size, digest) in recorded.items():
        try:
            if (folder / name).stat().st_size != size:
                return (
                    f"{name} is cut short or was changed: {(folder / name).stat().st_size} bytes, {size} were written"
                )
            if _digest(folder / name) != digest:
                return f"{name} has other bytes than were written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        except ValueError:  # not a file name: it holds NUL
            return f"{COMPLETE} cannot be read: it names a file {name!r}"
    named, step = NAME.fullmatch(folder.name), step_of_checkpoint(folder)
    if step is None:
        return f"its state cannot be read: {STATE}/trainer.json names no step"
    if named is not None and step != int(named.group(1)):
        return f"it is a renamed copy: its state is that of step {step}"
    return None


def is_read_on_resume(name: str) -> bool:
    """True if resuming reads this file of a checkpoint: weights, state, and a whole model's config.

    An adapter is rebuilt from the run's options, so resuming does not read its config.
    """
    return name.startswith(f"{STATE}/") or name.endswith((".safetensors", ".safetensors.index.json")) or name == CONFIG


def is_ours(folder: Path) -> bool:
    """True if this trainer wrote the checkpoint, judged by file names: Hugging Face's trainers use the name checkpoint-N too."""
    return any(os.path.lexists(folder / name) for name in (COMPLETE, STATE))


def step_of_checkpoint(folder: Path) -> int | None:
    """Returns the optimiser step that a checkpoint's state was saved at, whatever the folder is called; None if unknown."""
    state = _trainer_state(folder).get("state")
    step = state.get("step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def model_digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Returns size and digest of each model file (weights, a whole model's config) when it was written; {} if unknown."""
    return {name: facts for name, facts in _recorded_digests(folder).items() if "/" not in name}


def has_digests(folder: Path, recorded: Mapping[str, tuple[int, str]]) -> bool:
    """True if the folder holds these files with these sizes and digests. Reads each file once."""
    try:
        return all(
            (folder / name).stat().st_size == size and _digest(folder / name) == digest
            for name, (size, digest) in recorded.items()
        )
    except OSError:
        return False


def _has_all_sizes(folder: Path) -> bool:
    """True if every recorded file has its recorded size. A quick check at each save, which reads no weights."""
    recorded = _recorded_digests(folder)
    try:
        return bool(recorded) and all((folder / name).stat().st_size == size for name, (size, _) in recorded.items())
    except OSError:
        return False


def _recorded_digests(folder: Path) -> dict[str, tuple[int, str]]:
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        return {name: (size, digest) for name, (size, digest) in files.items() if is_read_on_resume(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _trainer_state(folder: Path) -> dict[str, Any]:
    """Returns the content of state/trainer.json, {} if it cannot be read."""
    try:
        found = json.loads((folder / STATE / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns optimiser state and trainer state. Raises CheckpointError if the checkpoint is not whole."""
    from safetensors.torch import load_file

    problem = checkpoint_problem(folder)
    if problem is not None:
        raise CheckpointError(f"cannot resume from {folder}: {problem}")
    state = load_file(folder / STATE / "optimizer.safetensors")
    return state, json.loads((folder / STATE / "trainer.json").read_text())


def remove_checkpoints(output_dir: Path) -> None:
    """Deletes all checkpoints that this trainer wrote, half-written and half-deleted ones too."""
    checkpoints, left_over = removed_checkpoints(output_dir)
    for folder in checkpoints:
        _remove(folder)
    for folder in left_over:
        delete(folder)


def removed_checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """Returns the checkpoints and the leftovers that remove_checkpoints deletes. Of a link, only the link itself is deleted."""
    checkpoints = [path for path in list_checkpoints(output_dir) if is_ours(path) or _leads_nowhere(path)]
    return checkpoints, [path for path in output_dir.glob("checkpoint-*") if LEFT_OVER.fullmatch(path.name)]


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def check_writable(output_dir: Path) -> None:
    """Raises UserError if output_dir cannot be created or written, before training rather than at the first checkpoint."""
    if os.path.lexists(output_dir) and (instead := why_no_folder(output_dir)) is not None:
        raise UserError(f"output_dir={str(output_dir)!r} {instead}: give another folder, or move it away")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".writable") as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise UserError(f"output_dir={str(output_dir)!r} cannot be written: {error}") from error


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, file)


def _write_digests(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _sync(file)
    names = [file.relative_to(folder).as_posix() for file in files]
    facts = {
        name: ((folder / name).stat().st_size, _digest(folder / name)) for name in names if is_read_on_resume(name)
    }
    (folder / COMPLETE).write_text(json.dumps({"files": facts}, indent=1))
    for path in (folder / COMPLETE, folder / STATE, folder):
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _blake2b(stream)
        )


def _blake2b(stream: Any) -> str:
    digest = hashlib.blake2b()  # Python 3.10
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _prune(output_dir: Path, keep: int | None, *, kept: set[Path], run: str | None) -> None:
    """Deletes the oldest checkpoints that this run wrote and that still have their names, until `keep` are left.

    Checkpoints in `kept` are never deleted, but count.
    """
    for folder in output_dir.glob(f"checkpoint-*{REMOVED}"):  # left by a run that was killed while it deleted
        if LEFT_OVER.fullmatch(folder.name):
            with suppress(OSError):
                delete(folder)
    if keep is None:
        return
    saved = [each for each in list_checkpoints(output_dir) if _was_saved_by(each, run)]
    others = [folder for folder in saved if folder not in kept]
    for folder in others[: max(0, len(saved) - keep)]:
        with suppress(OSError):  # one checkpoint too many must not end the run
            _remove(folder)


def _was_saved_by(folder: Path, run: str | None) -> bool:
    saved = _trainer_state(folder)
    named = folder.name == f"checkpoint-{step_of_checkpoint(folder) or 0:06d}" and not folder.is_symlink()
    return named and is_ours(folder) and saved.get("run") == run


def _remove(folder: Path) -> None:
    """Deletes a checkpoint after renaming it, so that a kill leaves a whole checkpoint or none."""
    if folder.is_symlink() or not folder.is_dir():  # the target of a link is not part of this folder
        delete(folder)
        return
    removed = folder.with_name(folder.name + REMOVED)
    delete(removed)
    folder.rename(removed)
    delete(removed)


def _step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))
