"""Messages of a command to the user before and after a run: on standard error, by one process of a launch.

Imports nothing heavy: the first line is there before torch is loaded.
"""

from __future__ import annotations

import os
import sys
import warnings

from synpo_fast.terminal.events import Kind, emit
from synpo_fast.terminal.ranks import LOCAL_RANKS, rank_of


def say(text: str, kind: Kind = "start") -> None:
    """A line on how far the start has come, from the first process of all."""
    if rank_of(os.environ) == 0:
        emit(kind, text)
        print(text, file=sys.stderr, flush=True)


def say_mistake(text: str) -> None:
    """A mistake that every process finds for itself: said once a machine, since a file may be missing on one of them."""
    if rank_of(os.environ, LOCAL_RANKS) == 0:
        print(text, file=sys.stderr, flush=True)


def print_to_a_pipe(text: str) -> None:
    """Prints, and is content with a reader that has seen enough, such as head."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes once more as it ends


LIBRARIES = r"(torch|transformers|deepspeed|peft|accelerate|huggingface_hub|tokenizers)(\.|$)"


def hide_notes_to_developers() -> None:
    """Hides warnings of what libraries are going to change, no news to who trains with them. Others are shown."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=LIBRARIES)


def hide_bars_of_libraries() -> None:
    """Transformers draws bars of its own while it reads and writes weights, through ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
