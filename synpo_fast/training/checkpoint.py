"""Checkpoints that are either whole or not there.

A checkpoint is written into `checkpoint-N.partial`; every file is flushed to the disk, their sizes and digests go into
complete.json, the folder is renamed to `checkpoint-N`, and only then older ones are deleted. So a process killed at any
moment, or a disk that fills up, leaves the last good one as it was.

    checkpoint-000100/
      adapter_model.safetensors, adapter_config.json      what peft loads; or model.safetensors, config.json, ...
      tokenizer and processor files
      state/optimizer.safetensors                         whole tensors by name: they load under another number of
      state/trainer.json                                  processes or another ZeRO stage, too
      complete.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = re.compile(r"checkpoint-(\d+)")
COMPLETE, STATE = "complete.json", "state"
REMOVED = ".removed"  # ends the name of a folder that is being deleted
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
) -> Path:
    """One process writes. save_model puts the files others load into the folder it is given.

    Raises CheckpointError, with the partial folder removed, if anything can not be written.
    """
    final = output_dir / f"checkpoint-{step:06d}"
    partial = output_dir / f"{final.name}.partial"
    try:
        _remove(partial)
        (partial / STATE).mkdir(parents=True)
        save_model(partial)
        _save_tensors(partial / STATE / "optimizer.safetensors", optimizer_state)
        (partial / STATE / "trainer.json").write_text(json.dumps(trainer_state, indent=1))
        _seal(partial)
        _remove(final)  # an earlier attempt at the same step, which did not pass its check
        partial.rename(final)
        _sync(output_dir)
    except Exception as error:  # safetensors and peft wrap errors of the disk in types of their own
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not write {final}: {error}") from error
    _prune(output_dir, keep, newest=final)
    return final


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; broken ones are named in a warning and passed over."""
    for folder in reversed(list_checkpoints(output_dir)):
        problem = what_is_broken(folder)
        if problem is None:
            return folder
        logger.warning("passing over %s: %s", folder, problem)
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """By step, the oldest first. Half-written ones have another name and are not among them."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if path.is_dir() and NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of)


def what_is_broken(folder: Path) -> str | None:
    """None for a whole checkpoint. Reads every file once."""
    try:
        files = json.loads((folder / COMPLETE).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{COMPLETE} can not be read ({error})"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or cut short"
        if _digest(file) != digest:
            return f"{name} has other bytes than were written"
    return None


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimiser and trainer state. Raises CheckpointError if the checkpoint is not whole."""
    from safetensors.torch import load_file

    problem = what_is_broken(folder) if folder.is_dir() else "there is no such folder"
    if problem is not None:
        raise CheckpointError(f"can not resume from {folder}: {problem}")
    state = load_file(folder / STATE / "optimizer.safetensors")
    return state, json.loads((folder / STATE / "trainer.json").read_text())


def remove_checkpoints(output_dir: Path) -> None:
    for folder in list_checkpoints(output_dir):
        _remove(folder)


def check_writable(output_dir: Path) -> None:
    """Raises ValueError now rather than after the first hundred steps."""
    probe = output_dir / ".writable"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r} can not be written: {error}") from error


def _save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.as_tensor(tensor).contiguous() for name, tensor in tensors.items()}, file)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        _sync(file)
    facts = {str(file.relative_to(folder)): (file.stat().st_size, _digest(file)) for file in files}
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


def _prune(output_dir: Path, keep: int | None, *, newest: Path) -> None:
    for folder in output_dir.glob(f"*{REMOVED}"):  # of a run that was killed meanwhile
        shutil.rmtree(folder, ignore_errors=True)
    if keep is None:
        return
    for folder in list_checkpoints(output_dir)[:-keep]:
        if folder != newest:
            with suppress(OSError):  # a checkpoint too many is no reason to stop
                _remove(folder)


def _remove(folder: Path) -> None:
    """In one move: a kill leaves a checkpoint that is whole, or none."""
    if folder.exists():
        removed = folder.with_name(folder.name + REMOVED)
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)


def _step_of(folder: Path) -> int:
    match = NAME.fullmatch(folder.name)
    assert match is not None
    return int(match.group(1))
