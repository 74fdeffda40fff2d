"""Checkpoints that are either whole or not there.

A checkpoint is written into `checkpoint-N.partial`; every file is flushed to the disk, sizes and digests go into
complete.json, the folder is renamed to `checkpoint-N`, and only then older ones are deleted. So a process killed at any
moment, or a disk that fills up, leaves the last good one as it was. A run deletes checkpoints that it wrote itself and no others.

    checkpoint-000100/
      adapter_model.safetensors, adapter_config.json      what peft loads; or model.safetensors, config.json, ...
      tokenizer and processor files
      state/optimizer.safetensors                         whole tensors by name: they load under another number of
      state/trainer.json                                  processes or another ZeRO stage, too
      complete.json                                       sizes, and digests of what resuming reads

Tokenizer, processor files and README are for others: they may be edited or missing, and the run goes on.
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
REMOVED = ".removed"  # ends the name of a folder that is being deleted
LEFT_OVER = re.compile(rf"checkpoint-\d+(\.partial|(\.partial)?{re.escape(REMOVED)})")
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read. The good ones that were there still are."""


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
    """One process writes. save_model puts the files others load into the folder it is given. best: the step of a checkpoint
    that is not deleted while its files are there. earlier_bests: of checkpoints that are never deleted.

    Raises CheckpointError, with the partial folder removed, if anything can not be written.
    """
    final = folder_of(output_dir, step)
    partial = output_dir / f"{final.name}.partial"
    try:
        _remove(partial)
        (partial / STATE).mkdir(parents=True)
        save_model(partial)
        _save_tensors(partial / STATE / "optimizer.safetensors", optimizer_state)
        (partial / STATE / "trainer.json").write_text(json.dumps(trainer_state, indent=1))
        _seal(partial)
        if os.path.lexists(final):  # somebody else's: what an earlier attempt left was moved away when this run began
            logger.warning("%s was there already: it is now %s", final, set_aside(final))
        partial.rename(final)
        _sync(output_dir)
    except Exception as error:  # safetensors and peft wrap errors of the disk in types of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}") from error
    kept = {final, *(folder_of(output_dir, each) for each in earlier_bests)}
    if best is not None and _has_all_bytes(folder_of(output_dir, best)):
        kept.add(folder_of(output_dir, best))
    _prune(output_dir, keep, kept=kept, run=trainer_state.get("run"))
    return final


def folder_of(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; broken ones are named in a warning and passed over."""
    newest, broken = newest_and_broken(output_dir)
    for folder, problem in broken:
        logger.warning("passing over %s: %s", folder, problem)
    return newest


def newest_and_broken(output_dir: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and those after it with what is wrong with each, the newest first."""
    broken: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(output_dir)):
        problem = what_is_broken(folder)
        if problem is None:
            return folder, broken
        broken.append((folder, problem))
    return None, broken


def list_checkpoints(output_dir: Path) -> list[Path]:
    """By step, the oldest first. Half-written ones have another name and are not among them.

    Links that lead nowhere are: what they stand for may be on a disk that is not mounted.
    """
    if not output_dir.is_dir():
        return []
    return sorted((path for path in output_dir.iterdir() if NAME.fullmatch(path.name)), key=_step_of)


def why_no_folder(path: Path) -> str | None:
    """Says what stands in the place of a folder: nothing, a file, a link that leads nowhere. None for a folder."""
    if path.is_dir():
        return None
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which is not there"
    return "is a file, not a folder" if path.exists() else "is not there"


def what_is_broken(folder: Path) -> str | None:
    """None for a checkpoint that a run can go on from. Reads weights and state once."""
    if (instead := why_no_folder(folder)) is not None:
        return instead
    if not is_ours(folder):
        return f"was not written by this trainer (it has no {COMPLETE} and no {STATE}/)"
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        sealed = {name: (size, digest) for name, (size, digest) in files.items() if is_needed(name)}
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except OSError as error:
        return f"{COMPLETE} cannot be read ({error.strerror})"
    except (json.JSONDecodeError, KeyError):
        return f"{COMPLETE} is empty or cut off"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"{COMPLETE} cannot be read: it does not list files with their sizes and digests"
    missing = {f"{STATE}/{name}" for name in STATE_FILES} - set(sealed)
    if missing or not any(name.endswith(".safetensors") and not name.startswith(STATE) for name in sealed):
        return f"{COMPLETE} names no {', '.join(sorted(missing)) or 'weights'}"
    for name, (size, digest) in sealed.items():
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
        except ValueError:  # no name of a file: it holds NUL
            return f"{COMPLETE} cannot be read: it names a file {name!r}"
    named, step = NAME.fullmatch(folder.name), step_in(folder)
    if step is None:
        return f"its state cannot be read: {STATE}/trainer.json names no step"
    if named is not None and step != int(named.group(1)):
        return f"it is a renamed copy: its state is that of step {step}"
    return None


def is_needed(name: str) -> bool:
    """Whether resuming reads this file of a checkpoint: weights, state, and a whole model's config. An adapter is made anew from
    the run's options, so its config is for others."""
    return name.startswith(f"{STATE}/") or name.endswith((".safetensors", ".safetensors.index.json")) or name == CONFIG


def is_ours(folder: Path) -> bool:
    """Whether this trainer wrote it, as far as names tell: Hugging Face's trainers call theirs checkpoint-N, too."""
    return any(os.path.lexists(folder / name) for name in (COMPLETE, STATE))


def step_in(folder: Path) -> int | None:
    """The optimiser steps that a checkpoint's state has behind it, whatever the folder is called."""
    state = _trainer_state(folder).get("state")
    step = state.get("step") if isinstance(state, dict) else None
    return step if isinstance(step, int) else None


def sealed_model(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of each model file (weights, a whole model's config) as the checkpoint was written; {} if not known."""
    return {name: facts for name, facts in _sealed(folder).items() if "/" not in name}


def has_bytes(folder: Path, sealed: Mapping[str, tuple[int, str]]) -> bool:
    """Whether the folder holds these files with these bytes. Reads each once."""
    try:
        return all(
            (folder / name).stat().st_size == size and _digest(folder / name) == digest
            for name, (size, digest) in sealed.items()
        )
    except OSError:
        return False


def _has_all_bytes(folder: Path) -> bool:
    """Whether every sealed file has its size: a quick look, at each save, which reads no weights."""
    sealed = _sealed(folder)
    try:
        return bool(sealed) and all((folder / name).stat().st_size == size for name, (size, _) in sealed.items())
    except OSError:
        return False


def _sealed(folder: Path) -> dict[str, tuple[int, str]]:
    try:
        files = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))["files"]
        return {name: (size, digest) for name, (size, digest) in files.items() if is_needed(name)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _trainer_state(folder: Path) -> dict[str, Any]:
    """{} if it can not be read."""
    try:
        found = json.loads((folder / STATE / "trainer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser and trainer state. Raises CheckpointError if the checkpoint is not whole."""
    from safetensors.torch import load_file

    problem = what_is_broken(folder)
    if problem is not None:
        raise CheckpointError(f"can not resume from {folder}: {problem}")
    state = load_file(folder / STATE / "optimizer.safetensors")
    return state, json.loads((folder / STATE / "trainer.json").read_text())


def remove_checkpoints(output_dir: Path) -> None:
    """All that this trainer wrote, half-written and half-deleted ones too."""
    checkpoints, left_over = removed_checkpoints(output_dir)
    for folder in checkpoints:
        _remove(folder)
    for folder in left_over:
        delete(folder)


def removed_checkpoints(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints and the leftovers that remove_checkpoints deletes: of links just the link, also where it leads nowhere."""
    checkpoints = [path for path in list_checkpoints(output_dir) if is_ours(path) or _leads_nowhere(path)]
    return checkpoints, [path for path in output_dir.glob("checkpoint-*") if LEFT_OVER.fullmatch(path.name)]


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def check_writable(output_dir: Path) -> None:
    """Raises ValueError now rather than after the first hundred steps."""
    if os.path.lexists(output_dir) and (instead := why_no_folder(output_dir)) is not None:
        raise UserError(f"output_dir={str(output_dir)!r} {instead}: give another one, or move that away")
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


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _sync(file)
    names = [file.relative_to(folder).as_posix() for file in files]
    facts = {name: ((folder / name).stat().st_size, _digest(folder / name)) for name in names if is_needed(name)}
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
        return hashlib.file_digest(stream, "blake2b").hexdigest() if hasattr(hashlib, "file_digest") else _slow(stream)


def _slow(stream: Any) -> str:
    digest = hashlib.blake2b()  # Python 3.10
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _prune(output_dir: Path, keep: int | None, *, kept: set[Path], run: str | None) -> None:
    """Deletes the oldest checkpoints that this run wrote, under the names it gave them, until `keep` are left. Those in `kept`
    are never deleted, and count."""
    for folder in output_dir.glob(f"checkpoint-*{REMOVED}"):  # of a run that was killed meanwhile
        if LEFT_OVER.fullmatch(folder.name):
            with suppress(OSError):
                delete(folder)
    if keep is None:
        return
    found = [each for each in list_checkpoints(output_dir) if _is_of(each, run)]
    others = [folder for folder in found if folder not in kept]
    for folder in others[: max(0, len(found) - keep)]:
        with suppress(OSError):  # a checkpoint too many is no reason to stop
            _remove(folder)


def _is_of(folder: Path, run: str | None) -> bool:
    saved = _trainer_state(folder)
    named = folder.name == f"checkpoint-{step_in(folder) or 0:06d}" and not folder.is_symlink()
    return named and is_ours(folder) and saved.get("run") == run


def _remove(folder: Path) -> None:
    """In one move: a kill leaves a checkpoint that is whole, or none."""
    if folder.is_symlink() or not folder.is_dir():  # what a link points to is not this folder's
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
