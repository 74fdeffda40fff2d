"""Events of a run for the program that started it: each message, with its kind, as a JSON line in a file that the program names.

    {"kind": "step", "text": "step 10/500  loss -0.61  ..."}

The text is the one printed to the terminal, and its wording may change; kinds do not change. An event is written before its
text is printed, so a program that has read the printed line finds the event. Steps are events every `logging_steps` steps, even
if the terminal shows a progress bar instead of lines.
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
    "run",  # the model, the data and the settings of the run
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
    "profile",  # the settings of a profile
    "round",  # of a profile
    "note",
]


class Event(NamedTuple):
    """One message of a run."""

    kind: str
    text: str


def emit(kind: Kind, text: str) -> None:
    """Appends an event to the file that the variable names, if it is set; only rank 0 does.

    A failed write (a full disk, a pipe without a reader) is ignored, so that it does not end the run.
    """
    file = os.environ.get(VARIABLE)
    if not file or rank_of(os.environ) != 0:
        return
    line = json.dumps({"kind": kind, "text": printable(text)}) + "\n"
    with suppress(OSError):
        # Without O_NONBLOCK, opening a named pipe would wait for a reader.
        place = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            os.write(place, line.encode())
        finally:
            os.close(place)


class EventReader:
    """Reads a file of events while it grows."""

    def __init__(self, file: Path) -> None:
        self.file, self.position = file, 0

    def new(self) -> list[Event]:
        """Returns the events since the last call. An unfinished line is left for the next call; lines that are no events are
        skipped."""
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
