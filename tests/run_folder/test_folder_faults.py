"""Folders with something broken: dangling links, wrong files, a full disk. Nothing is lost, and no run silently starts over."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.run_folder import superseded
from synpo_fast.run_folder.checkpoint import (
    COMPLETE,
    check_writable,
    checkpoint_problem,
    list_checkpoints,
    newest_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)
from synpo_fast.run_folder.overwriting import check_inputs_stay, remove_earlier_run
from synpo_fast.run_folder.resume_choice import resolve_resume
from synpo_fast.run_folder.start_choice import Start, choose_start, prepare_run_folder, step_of_line
from synpo_fast.run_folder.superseded import set_aside, set_aside_lines
from synpo_fast.terminal.report_once import lost_another_process
from synpo_fast.training.engine import _quiet
from synpo_fast.training.rank_zero import on_rank_zero
from tests.world import environment


def write(folder, step, **more):
    def save_model(into):
        (into / "adapter_model.safetensors").write_bytes(b"x" * 100)

    state = {"state": {"step": step}, **more}
    return write_checkpoint(folder, step, save_model=save_model, optimizer_state={}, trainer_state=state, keep=None)


def config_of(folder, **more):
    values = {"model_name_or_path": "base", "train_file": "pairs.jsonl", "output_dir": str(folder), **more}
    return TrainConfig(**values)


def start_of(folder, **more):
    return choose_start(resolve_resume(config_of(folder, **more)))


def reseal(folder, name, text):
    """Writes another content of a file, and the digest that belongs to it."""
    from synpo_fast.run_folder.checkpoint import _digest

    (folder / name).write_text(text)
    facts = json.loads((folder / COMPLETE).read_text())
    facts["files"][name] = [(folder / name).stat().st_size, _digest(folder / name)]
    (folder / COMPLETE).write_text(json.dumps(facts))


def test_checkpoints_that_are_links_to_what_is_gone_are_no_reason_to_start_over(tmp_path, caplog):
    run, store = tmp_path / "run", tmp_path / "store"
    for step in (2, 4):
        write(store, step)
    run.mkdir()
    for step in (2, 4):
        (run / f"checkpoint-{step:06d}").symlink_to(f"../store/checkpoint-{step:06d}")
    store.rename(tmp_path / "unmounted")
    with pytest.raises(
        UserError, match=r"checkpoint-000004: is a link to \.\./store/checkpoint-000004, which is not there"
    ):
        start_of(run, resume="auto")
    with pytest.raises(UserError, match="holds checkpoints"):
        start_of(run)
    (tmp_path / "unmounted").rename(store)
    assert start_of(run, resume="auto").checkpoint == run / "checkpoint-000004"
    (store / "checkpoint-000004").rename(tmp_path / "away")
    assert newest_checkpoint(run) == run / "checkpoint-000002"
    assert "skipping" in caplog.text and "which is not there" in caplog.text


def test_a_file_in_the_place_of_a_checkpoint_is_said(tmp_path):
    (tmp_path / "checkpoint-000002").write_text("x")
    (only,) = list_checkpoints(tmp_path)
    assert checkpoint_problem(only) == "is a file, not a folder"
    with pytest.raises(UserError, match="is a file"):
        start_of(tmp_path, resume="auto")


def test_a_link_that_makes_room_still_leads_to_its_target(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-000003").symlink_to("../store/old")
    write(run, 3)
    write(tmp_path / "store", 1).rename(tmp_path / "store" / "old")
    assert (run / "superseded" / "checkpoint-000003" / COMPLETE).is_file()
    assert not (run / "checkpoint-000003").is_symlink()


def test_checkpoints_of_another_trainer_are_not_called_a_run_of_ours(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "trainer_state.json").write_text("{}")
    for more in ({"resume": "auto"}, {}):
        with pytest.raises(UserError, match=r"checkpoint-500.*not written by this trainer") as raised:
            start_of(tmp_path, **more)
        assert "holds a run" not in str(raised.value) and "output_dir" in str(raised.value)
    assert start_of(tmp_path, overwrite_output_dir=True).checkpoint is None


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        (COMPLETE, "", "complete.json is empty or cut off"),
        (COMPLETE, "{}", "complete.json is empty or cut off"),
        (COMPLETE, '{"files": {"state/tr', "complete.json is empty or cut off"),
        (COMPLETE, '{"files": 3}', "complete.json cannot be read"),
        ("state/trainer.json", '{"state": []}', "its state cannot be read"),
        ("state/trainer.json", "[]", "its state cannot be read"),
        ("state/trainer.json", '{"state": {"step": 1e999}}', "its state cannot be read"),
    ],
)
def test_a_broken_file_of_a_checkpoint_is_told_in_words(tmp_path, name, text, reason):
    folder = write(tmp_path, 3)
    if name == COMPLETE:
        (folder / name).write_text(text)
    else:
        reseal(folder, name, text)
    assert reason in checkpoint_problem(folder)
    with pytest.raises(UserError, match="its only checkpoint is not whole"):
        start_of(tmp_path, resume="auto")


def test_a_name_that_no_file_can_have_is_a_broken_checkpoint(tmp_path):
    folder = write(tmp_path, 3)
    facts = json.loads((folder / COMPLETE).read_text())
    facts["files"]["state/a\0b"] = [1, "x"]
    (folder / COMPLETE).write_text(json.dumps(facts))
    assert "complete.json cannot be read" in checkpoint_problem(folder)


def test_a_line_of_no_step_that_a_run_can_have_is_not_kept():
    for line in ('{"step": 1e999}', '{"step": NaN}', '{"step": [1]}', "[1]", '{"st', "[" * 100000):
        assert step_of_line(line) == float("inf"), line[:20]
    assert step_of_line('{"step": 3}') == 3


def test_links_named_like_leftovers_are_unlinked(tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    write(run, 2)
    mine.mkdir()
    (mine / "notes").write_text("x")
    for name in ("checkpoint-14.partial", "checkpoint-000002.removed", "checkpoint-9.partial.removed"):
        (run / name).symlink_to(mine)
    (run / "checkpoint-3.partial").write_text("a file")
    (run / "checkpoint-000007").symlink_to("nowhere")
    remove_checkpoints(run)
    assert list(run.iterdir()) == [] and (mine / "notes").exists()


def test_leftovers_that_are_links_or_files_do_not_stop_a_save(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "checkpoint-000001.partial").write_text("a file")
    (tmp_path / "checkpoint-000002.partial").symlink_to(tmp_path / "mine")
    (tmp_path / "checkpoint-000003.partial").symlink_to("nowhere")
    for step in (1, 2, 3):
        assert checkpoint_problem(write(tmp_path, step)) is None
    assert list((tmp_path / "mine").iterdir()) == []


class FullDisk:
    """A stream that takes some characters and then no more, as a disk that fills up."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def writelines(self, lines):
        self.stream.write("".join(lines)[: self.room])
        self.stream.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_half_line_and_a_retry_no_line_twice(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text("keep 1\nmove 2\nmove 3\n")
    kept = tmp_path / "superseded" / "metrics.jsonl"
    kept.parent.mkdir()
    kept.write_text("earlier")  # an earlier version's half line
    whole = Path.open

    def open_on_a_full_disk(path, mode="r", **more):
        stream = whole(path, mode, **more)
        return FullDisk(stream, 9) if mode[0] in "aw" else stream

    monkeypatch.setattr(Path, "open", open_on_a_full_disk)
    for _ in range(2):
        with pytest.raises(OSError, match=r"No space left on device: '.*superseded/metrics\.jsonl'"):
            set_aside_lines(file, lambda line: line.startswith("keep"))
        assert kept.read_text() == "earlier" and file.read_text() == "keep 1\nmove 2\nmove 3\n"
    monkeypatch.undo()
    assert set_aside_lines(file, lambda line: line.startswith("keep")) == 2
    assert kept.read_text() == "earlier\nmove 2\nmove 3\n" and file.read_text() == "keep 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", superseded.FOLDER]


def test_a_file_called_superseded_is_said(tmp_path):
    (tmp_path / "superseded").write_text("mine")
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match=r"superseded.* is a file.*move it away"):
        set_aside(tmp_path / "a")
    with pytest.raises(UserError, match=r"superseded.* is a file.*move it away"):
        set_aside_lines(tmp_path / "a", lambda line: False)


def test_an_output_folder_that_is_none_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="is a file, not a folder"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match=r"is a link to .*gone, which is not there"):
        check_writable(tmp_path / "link")


def test_a_run_that_went_on_from_another_folder_does_so_again(tmp_path):
    run, other = tmp_path / "run", write(tmp_path / "other", 4)
    run.mkdir()
    start = start_of(run, resume=str(other))
    prepare_run_folder(config_of(run, resume=str(other)), start, steps_done=4, config_text="a: 1\n")
    (run / "metrics.jsonl").write_text('{"step": 5}\n')  # and killed before its first checkpoint
    again = start_of(run, resume="auto")
    assert again.checkpoint == other and "resuming from" in again.notes[0] and str(other) in again.notes[0]
    prepare_run_folder(config_of(run, resume="auto"), again, steps_done=4, config_text="a: 1\n")
    assert start_of(run, resume="auto").checkpoint == other
    assert (run / "superseded" / "metrics.jsonl").read_text() == '{"step": 5}\n'
    other.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"resumed from .*other/checkpoint-\d+, which cannot be used \(is not there\)"
    ) as raised:
        start_of(run, resume="auto")
    assert "--overwrite_output_dir" in str(raised.value)
    assert start_of(run, resume="auto", output_dir=str(tmp_path / "new")).checkpoint is None
    prepare_run_folder(
        config_of(run), Start(), steps_done=0, config_text="a: 1\n"
    )  # a new run: resumed_from.json is gone
    assert start_of(run, resume="auto").checkpoint is None
    write(run, 1)
    assert start_of(run, resume="auto").checkpoint == run / "checkpoint-000001"


@pytest.mark.parametrize("text", ["", "[]", '{"checkpoint": 3}', '{"checkpoint": "a\\u0000"}', "[" * 100000])
def test_a_broken_note_of_where_a_run_came_from_stops_it(tmp_path, text):
    (tmp_path / "resumed_from.json").write_text(text)
    with pytest.raises(UserError, match=r"resumed_from\.json|was resumed from a"):
        start_of(tmp_path, resume="auto")


def test_auto_says_that_it_begins_at_step_0(tmp_path):
    (note,) = start_of(tmp_path / "new", resume="auto").notes
    assert note == f"no checkpoint in {tmp_path / 'new'}: starting at step 0"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 12}\n{"st')
    (note,) = start_of(tmp_path, resume="auto").notes
    assert note.startswith(f"no checkpoint in {tmp_path}: starting at step 0; ")
    assert "metrics.jsonl has lines up to step 12" in note
    assert start_of(tmp_path).notes == ()


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("model_name_or_path", "checkpoint-000002"), ("train_file", "superseded/pairs.jsonl"),
        ("train_file", "metrics.jsonl"), ("eval_file", "checkpoint-000002/eval.jsonl"), ("video_root", "tensorboard/videos"),
        ("deepspeed", "wandb/zero.json"), ("feature_cache", "superseded"), ("model_name_or_path", "../link"),
        ("model_name_or_path", "."),
    ],
)  # fmt: skip
def test_overwriting_refuses_to_delete_what_the_run_reads(tmp_path, option, name):
    run = tmp_path / "run"
    write(run, 2)
    for file in (
        "superseded/pairs.jsonl",
        "metrics.jsonl",
        "wandb/zero.json",
        "tensorboard/videos/a.mp4",
        "model.safetensors",
    ):
        (run / file).parent.mkdir(exist_ok=True, parents=True)
        (run / file).write_text("x")
    (run / "best_model.json").write_text('{"files": ["model.safetensors"]}')
    (tmp_path / "link").symlink_to(run / "checkpoint-000002")
    with pytest.raises(UserError, match=rf"--overwrite_output_dir would delete .*which {option}=.* reads"):
        start_of(run, overwrite_output_dir=True, **{option: str(run / name)})
    assert (
        start_of(run, overwrite_output_dir=True, train_file=str(run / "mine.jsonl"), video_root=str(run)).checkpoint
        is None
    )
    with pytest.raises(UserError, match=r"would delete .*superseded.*which config=.* reads"):
        check_inputs_stay(config_of(run, overwrite_output_dir=True), config_file=str(run / "superseded" / "a.yaml"))
    check_inputs_stay(config_of(run), config_file=str(run / "superseded" / "a.yaml"))


def test_overwriting_checks_before_it_deletes(tmp_path, monkeypatch):
    """Root may write anywhere, so the answer of the system is put on here."""
    write(tmp_path, 2)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "log").write_text("x")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "wandb" and allowed(path, mode))
    with pytest.raises(UserError, match=r"cannot be deleted.*wandb"):
        remove_earlier_run(tmp_path, keep_reference=False)
    assert list_checkpoints(tmp_path) and (tmp_path / "wandb" / "log").exists()


def test_a_full_disk_is_told_with_file_and_advice(group):
    def work():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl")

    with pytest.raises(UserError, match=r"written: .*'/run/metrics\.jsonl' \(the disk is full: free some room"):
        on_rank_zero(work)


@pytest.mark.parametrize("option", ["--help", "--print_config"])
def test_a_reader_that_has_seen_enough_is_no_error(option, tmp_path):
    command = [
        sys.executable,
        "-m",
        "synpo_fast.train",
        "--model_name_or_path",
        "a",
        "--train_file",
        "b",
        "--output_dir",
        "c",
    ]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run([*command, option], stdout=written, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(written)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_is_gone_is_told_from_other_errors(monkeypatch):
    gone = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:31337")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_another_process(gone) and not lost_another_process(RuntimeError("shape mismatch"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not lost_another_process(gone)


def test_what_deepspeed_prints_is_hidden_unless_asked_for(tmp_path, capsys):
    for verbose, shown in ((False, ""), (True, "MA 0.0 GB\n")):
        with _quiet(config_of(tmp_path, verbose=verbose)):
            print("MA 0.0 GB")
        assert capsys.readouterr().out == shown
