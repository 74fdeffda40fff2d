"""The output of a child process is kept and shown where it matters, and its failure is reported."""

import json
import os
import signal
import sys
import threading

import pytest

from synpo_fast.demo import launch


def run(code, log):
    return launch._run_and_show([sys.executable, "-c", code], log)


def says(*events):
    """Code of a child that emits events, and prints a line after each, as the trainer does."""
    told = [f"emit({kind!r}, {text!r}); print({text!r}, flush=True)" for kind, text in events]
    return "\n".join(["from synpo_fast.terminal.events import emit", *told])


def test_events_of_the_training_are_shown_and_all_lines_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "SHOW_SECONDS", 0.0)
    log = tmp_path / "log.txt"
    code = "print('[INFO] noise')\n" + says(("run", "sft on 5 pairs"), ("step", "step 1/2  loss 3"), ("note", "a note"))
    assert run(code, log) == 0
    assert capsys.readouterr().out.splitlines() == ["  sft on 5 pairs", "  step 1/2  loss 3"]
    assert all(text in log.read_text() for text in ("noise", "sft on", "step 1/2", "a note"))
    assert list(tmp_path.iterdir()) == [log]


def test_no_line_is_shown_or_left_out_by_its_wording(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "SHOW_SECONDS", 0.0)
    wordings = ["step 1/2", "finished at step 2", "synpo on 3 pairs", "evaluation: x", "quite another wording"]
    assert run(f"for line in {wordings}: print(line)", tmp_path / "log.txt") == 0
    assert run(says(*(("note", text) for text in wordings)), tmp_path / "log.txt") == 0
    assert capsys.readouterr().out == ""
    for kind in launch.SHOWN:
        assert run(says((kind, "quite another wording")), tmp_path / "log.txt") == 0
        assert capsys.readouterr().out == "  quite another wording\n", kind


def test_steps_are_shown_now_and_then_and_everything_else_at_once(tmp_path, capsys):
    events = [("step", f"step {number}/9") for number in range(1, 9)]
    assert run(says(*events, ("evaluation", "evaluation: 1"), ("finished", "the end")), tmp_path / "log.txt") == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["  evaluation: 1", "  the end"]
    assert run(says(*events[:2]).replace("\n", "\nimport time; time.sleep(0.4)\n"), tmp_path / "log.txt") == 0
    assert capsys.readouterr().out == "", "a step waits for SHOW_SECONDS"


def test_it_tells_that_it_is_at_work_while_nothing_comes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "QUIET_SECONDS", 0.1)
    assert run("import time; time.sleep(0.6)", tmp_path / "log.txt") == 0
    assert "still running after" in capsys.readouterr().out


@pytest.fixture
def interruptible():
    """Started in the background by a shell, Python is told to ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_child_too(tmp_path, interruptible):
    code = "import os, time; print('step', os.getpid(), flush=True); time.sleep(60)"
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run(code, tmp_path / "log.txt")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log.txt").read_text().split()[1]), 0)


@pytest.mark.heavy
def test_a_failure_names_the_log_and_shows_its_end(tmp_path):
    options = {"train_file": tmp_path / "does-not-exist.jsonl", "max_steps": 1, "model_name_or_path": "tiny:text"}
    with pytest.raises(launch.DemoError, match=r"sft training ended with status .*log\.txt(.|\n)*does-not-exist"):
        launch.train(tmp_path / "run", "sft", options)


def test_a_profile_that_fails_says_so_and_one_that_is_there_is_read(tmp_path, monkeypatch):
    commands = []

    def ends_badly(command, log):
        commands.append(command)
        log.write_text("noise\nno room for the frozen copy\n")
        return 3

    monkeypatch.setattr(launch, "_run_and_show", ends_badly)
    with pytest.raises(launch.DemoError, match=r"profile of synpo and dpo ended with status 3(.|\n)*no room for"):
        launch.profile(tmp_path / "run", "synpo", {"seed": 0}, 5)
    (command,) = commands
    assert command[command.index("--profile") + 1] == "5"
    assert not (tmp_path / "run" / "profile.json").exists(), "the next call has to try again"

    (tmp_path / "run" / "profile.json").write_text(json.dumps({"variants": []}))
    assert launch.profile(tmp_path / "run", "synpo", {"seed": 0}, 5) == {"variants": []}
    assert len(commands) == 1
