"""What a run tells a program that started it: a JSON line for each thing said, with its kind, in a file that the program names.

    {"kind": "step", "text": "step 10/500  loss -0.61  ..."}

The text is that of the terminal, and may change its wording; kinds stay. A line is written before it is printed, so who has
read the print finds the event. Steps are events as often as they are lines, also where a terminal has a bar in their place.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from synpo_fast.terminal.printable import printable
from synpo_fast.terminal.ranks import rank_of

VARIABLE = "SYNPO_FAST_EVENTS"
Kind = Literal[
    "start",  # loading, reading, building
    "warning",
    "run",  # what is trained, on what, how
    "resuming",
    "reference",
    "step",
    "evaluation",
    "caption",
    "best",
    "report",
    "nothing_to_do",
    "finished",
    "stopped",
    "profile",  # what is profiled
    "round",  # of a profile
    "note",
]


class Event(NamedTuple):
    kind: str
    text: str


def emit(kind: Kind, text: str) -> None:
    """Appends a line, from the first process of all, if the variable names a file. A write that fails stops nobody: a full disk,
    or a pipe that nobody reads."""
    file = os.environ.get(VARIABLE)
    if not file or rank_of(os.environ) != 0:
        return
    line = json.dumps({"kind": kind, "text": printable(text)}) + "\n"
    with suppress(OSError):
        # Without O_NONBLOCK a named pipe would be waited for.
        place = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            os.write(place, line.encode())
        finally:
            os.close(place)


class EventReader:
    """Reads a file of events as it grows."""

    def __init__(self, file: Path) -> None:
        self.file, self.position = file, 0

    def new(self) -> list[Event]:
        """Events since the last call. A line that has no end yet is left for the next one, and what is no event is skipped."""
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self.position)
            lines = stream.read().split(b"\n")[:-1]
        self.position += sum(len(line) + 1 for line in lines)
        return [event for line in lines if (event := _event(line)) is not None]


def _event(line: bytes) -> Event | None:
    try:
        found = json.loads(line)
        return Event(str(found["kind"]), str(found["text"]))
    except (ValueError, TypeError, KeyError):
        return None
