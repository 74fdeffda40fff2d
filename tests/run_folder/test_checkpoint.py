"""Checkpoints are whole or not there: half-written ones, broken ones, full disks and folders that cannot be written."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from synpo_fast.run_folder.checkpoint import (
    CheckpointError,
    check_writable,
    checkpoint_problem,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    remove_checkpoints,
    write_checkpoint,
)
from tests.world import environment

STATE = {"a.exp_avg": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(7)}


def write(folder, step, keep=None, size=100):
    def save_model(into):
        (into / "adapter_model.safetensors").write_bytes(bytes(size))

    return write_checkpoint(
        folder, step, save_model=save_model, optimizer_state=STATE, trainer_state={"state": {"step": step}}, keep=keep
    )


def test_what_was_written_comes_back(tmp_path):
    folder = write(tmp_path, 5)
    tensors, trainer = read_state(folder)
    assert trainer == {"state": {"step": 5}}
    assert set(tensors) == set(STATE) and all(torch.equal(tensors[name], STATE[name]) for name in STATE)


def test_the_newest_is_by_number_and_old_ones_go(tmp_path):
    for step in (8, 9, 10, 1000000):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-000010", "checkpoint-1000000"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-1000000"
    remove_checkpoints(tmp_path)
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("deleting", ["prune", "all"])
def test_a_kill_while_one_is_deleted_leaves_none_that_is_broken(tmp_path, monkeypatch, deleting):
    def killed(folder, **_):
        if folder.exists():
            (folder / "adapter_model.safetensors").unlink()
            raise SystemExit

    for step in (1, 2):
        write(tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr("synpo_fast.run_folder.checkpoint.shutil.rmtree", killed)
        with pytest.raises(SystemExit):
            write(tmp_path, 3, keep=1) if deleting == "prune" else remove_checkpoints(tmp_path)
    left = list_checkpoints(tmp_path)
    assert left and [checkpoint_problem(folder) for folder in left] == [None] * len(left)
    write(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000004"]


def test_half_written_folders_are_not_seen_and_are_replaced(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-000002.partial").mkdir()
    (tmp_path / "checkpoint-000002.partial" / "rest").write_text("x")
    assert newest_checkpoint(tmp_path).name == "checkpoint-000001"
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "state/optimizer.safetensors", "state/trainer.json"])
@pytest.mark.parametrize("damage", [cut, flip, os.remove], ids=["cut", "flip", "remove"])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path, name, damage, caplog):
    good, broken = write(tmp_path, 1), write(tmp_path, 2)
    damage(broken / name)
    assert newest_checkpoint(tmp_path) == good
    assert str(broken) in caplog.text and name in caplog.text
    with pytest.raises(CheckpointError, match="cannot resume"):
        read_state(broken)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_without_its_seal_a_checkpoint_does_not_count(tmp_path, content):
    folder = write(tmp_path, 1)
    (folder / "complete.json").unlink()
    if content is not None:
        (folder / "complete.json").write_text(content)
    assert "complete.json" in checkpoint_problem(folder)


def test_an_error_while_writing_leaves_the_last_one_and_no_rest(tmp_path):
    write(tmp_path, 1)

    def save_model(into):
        (into / "part").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(tmp_path, 2, save_model=save_model, optimizer_state=STATE, trainer_state={}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert checkpoint_problem(tmp_path / "checkpoint-000001") is None


def test_a_disk_that_fills_up(tmp_path):
    """The real thing as far as a process can have it: no file may grow past 50 kB."""
    write(tmp_path, 1)
    code = (
        "import sys; from pathlib import Path; from tests.run_folder.test_checkpoint import write;"
        "from synpo_fast.run_folder.checkpoint import CheckpointError\n"
        "try: write(Path(sys.argv[1]), 2, size=100_000)\n"
        "except CheckpointError as error: print(error); sys.exit(9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 9 and "File too large" in done.stdout, done.stderr
    assert newest_checkpoint(tmp_path).name == "checkpoint-000001"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, said in (
        (tmp_path / "file", "is a file, not a folder"),
        (tmp_path / "file" / "under", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=said):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_the_seal_lists_what_resuming_reads(tmp_path):
    def save_model(into):
        for name in ("model.safetensors", "config.json", "adapter_config.json", "README.md", "tokenizer.json"):
            (into / name).write_text("x")

    trainer = {"state": {"step": 1}}
    folder = write_checkpoint(
        tmp_path, 1, save_model=save_model, optimizer_state=STATE, trainer_state=trainer, keep=None
    )
    listed = json.loads((folder / "complete.json").read_text())["files"]
    assert set(listed) == {"model.safetensors", "config.json", "state/optimizer.safetensors", "state/trainer.json"}
