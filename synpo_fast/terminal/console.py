"""Messages of a command to the user before and after a run: on standard error, from one process of a launch.

This module imports nothing heavy, so the first line appears before torch is loaded.
"""

from __future__ import annotations

import os
import sys
import warnings

from synpo_fast.terminal.events import Kind, emit
from synpo_fast.terminal.ranks import LOCAL_RANKS, rank_of


def say(text: str, kind: Kind = "start") -> None:
    """Prints a line of progress and emits it as an event; only rank 0 of the launch does."""
    if rank_of(os.environ) == 0:
        emit(kind, text)
        print(text, file=sys.stderr, flush=True)


def say_mistake(text: str) -> None:
    """Prints a mistake that every process finds by itself, once per machine, since a file may be missing on one machine only."""
    if rank_of(os.environ, LOCAL_RANKS) == 0:
        print(text, file=sys.stderr, flush=True)


def print_to_a_pipe(text: str) -> None:
    """Prints to standard output; no error if the reader, such as head, has closed the pipe."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it exits


NOISY_LIBRARIES = r"(torch|transformers|deepspeed|peft|accelerate|huggingface_hub|tokenizers)(\.|$)"


def hide_notes_to_developers() -> None:
    """Hides libraries' warnings of future changes, which do not concern a user who trains. Other warnings are shown."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=NOISY_LIBRARIES)


def hide_bars_of_libraries() -> None:
    """Turns off the progress bars of transformers, which it draws over ours while it reads and writes weights."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
