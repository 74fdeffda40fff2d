"""The events of a run, for the program that started it: their kinds and order, even if file or terminal fail."""

import json
import os
import re
import sys
from pathlib import Path
from typing import get_args

import pytest

from synpo_fast.terminal.console import say
from synpo_fast.terminal.events import VARIABLE, Event, EventReader, Kind, emit
from synpo_fast.terminal.progress import Progress
from tests.world import options

DOCS = Path(__file__).resolve().parents[2] / "docs" / "training.md"


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "events.jsonl"))
    return EventReader(tmp_path / "events.jsonl")


def test_a_run_tells_its_kinds_in_their_order(world, tmp_path, in_one_process, reader):
    values = options(world, tmp_path / "out", max_steps=2, eval_split=0.25, loss_type="dpo", report=False)
    in_one_process(values)
    kinds = list(dict.fromkeys(event.kind for event in reader.new()))
    assert kinds == ["start", "run", "note", "reference", "evaluation", "caption", "step", "finished"]
    in_one_process({**values, "resume": "auto"})
    assert [event.kind for event in reader.new() if event.kind != "start"][-1] == "nothing_to_do"
    in_one_process({**values, "resume": "auto", "max_steps": 3})
    kinds = [event.kind for event in reader.new()]
    assert "resuming" in kinds and kinds[-1] == "finished"


def test_lines_are_those_of_the_terminal_and_are_there_before_them(reader, capsys, monkeypatch):
    progress = Progress(shows=True, bar=False, first_step=0, num_steps=4, every=2)
    for step in range(1, 5):
        progress.show(step, {"loss": 0.5})
    progress.note({"eval_loss": 0.5, "eval_captions": [{"id": "a", "caption": "text\x1b"}]})
    progress.say("so far")
    say("loading")
    events = reader.new()
    assert [text for _, text in events] == capsys.readouterr().err.splitlines()
    assert [kind for kind, _ in events] == ["step", "step", "evaluation", "caption", "note", "start"]
    monkeypatch.setattr(progress, "_print", lambda _: events.extend(reader.new()))
    progress.say("done", "finished")
    assert events[-1] == Event("finished", "done")


def test_only_the_first_process_tells(reader, monkeypatch):
    Progress(shows=False, bar=False, first_step=0, num_steps=4, every=1).show(1, {"loss": 0.5})
    monkeypatch.setenv("RANK", "1")
    emit("note", "of the second")
    say("of the second")
    assert reader.new() == [] and not reader.file.exists()


def test_nothing_is_written_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    emit("note", "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/dev/full", "no/such/folder/file", ".", "pipe"])
def test_a_write_that_fails_stops_nobody(place, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")  # which nobody reads
    monkeypatch.setenv(VARIABLE, str(tmp_path / place))
    emit("note", "x")


def test_events_outlive_the_terminal(reader, monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115
    progress = Progress(shows=True, bar=False, first_step=0, num_steps=3, every=1)
    progress.say("x")
    progress.show(1, {"loss": 1.0})
    assert [event.kind for event in reader.new()] == ["note", "step"]


def test_half_a_line_is_read_when_it_is_whole(reader):
    line = json.dumps({"kind": "step", "text": "one"}).encode()
    reader.file.write_bytes(b"no event\n[1]\n" + line[:9])
    assert reader.new() == []
    with reader.file.open("ab") as file:
        file.write(line[9:] + b"\n")
    assert reader.new() == [Event("step", "one")] and reader.new() == []


def test_the_docs_name_the_variable_and_every_kind():
    (paragraph,) = [part for part in DOCS.read_text().split("\n\n") if VARIABLE in part]
    (kinds,) = re.findall(r"Kinds are ([^.]*)\.", paragraph)
    assert tuple(re.findall(r"`(\w+)`", kinds)) == get_args(Kind)
