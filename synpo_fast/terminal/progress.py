"""A progress bar for people, one line a logged step for files."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from synpo_fast.terminal.events import Kind, emit
from synpo_fast.terminal.printable import printable, printable_line

SHOWN = ("loss", "rewards/margins", "grad_norm", "learning_rate", "pairs_per_s", "skipped_pairs")
BAR = "{n_fmt}/{total_fmt} |{bar:24}|{postfix}"  # a fixed width: numbers change their length with every step
STEPS_BEHIND_ETA = 50


class Progress:
    """Shows on one rank. A terminal gets a bar (unless told not to), anything else a line every `every` steps; who reads events
    (events.py) gets the lines in either case.

    The time left is that of the last steps alone, times the steps that are left: evaluations and checkpoints are not in it,
    nor is this process's first step, which waits for its first videos and compiles what is compiled.
    """

    def __init__(self, *, shows: bool, bar: bool, first_step: int, num_steps: int, every: int) -> None:
        self.tells, self.num_steps, self.every = shows, num_steps, every
        self.shows = shows  # until nobody reads it
        self.first_step = first_step
        self._seconds: deque[float] = deque(maxlen=STEPS_BEHIND_ETA)
        self._bar: Any = None
        if shows and bar and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        if not self.tells:
            return
        if step > self.first_step + 1 and "step_s" in numbers:
            self._seconds.append(numbers["step_s"])
        shown = {name.rsplit("/", 1)[-1]: f"{numbers[name]:.4g}" for name in SHOWN if name in numbers}
        line = None
        if step % self.every == 0 or step == self.num_steps:
            facts = "  ".join(f"{name} {value}" for name, value in shown.items())
            line = f"step {step}/{self.num_steps}  {facts}  left {self._left(step)}"
            emit("step", line)
        if self._bar is None:
            self._print(line)
        elif self.shows:
            with self._until_nobody_reads():
                self._bar.set_postfix_str(self._fitting(step, shown), refresh=False)
                self._bar.update(step - self._bar.n)
                self._bar.refresh()

    def note(self, numbers: Mapping[str, Any]) -> None:
        """An evaluation's numbers and captions."""
        if not self.tells:
            return
        facts = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, float))
        self.say(f"evaluation: {facts}", "evaluation")
        for row in numbers.get("eval_captions", []):
            self.say(f"  {printable_line(row['id'])}: {printable_line(row['caption'][:300])}", "caption")

    def say(self, text: str, kind: Kind = "note") -> None:
        """A line, or several."""
        if self.tells:
            emit(kind, text)
            self._print(text)

    def _print(self, text: str | None) -> None:
        """Names and captions in it are other people's: what would steer the terminal is spelt out."""
        if text is None or not self.shows:
            return
        text = printable(text)
        with self._until_nobody_reads():
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with self._until_nobody_reads():
                self._bar.close()

    @contextmanager
    def _until_nobody_reads(self) -> Iterator[None]:
        """A terminal that was closed, or a pipe whose reader ended, is no reason to lose a checkpoint."""
        try:
            yield
        except OSError:
            self.shows = False

    def _fitting(self, step: int, shown: Mapping[str, str]) -> str:
        """The time left, and as many of the numbers as the terminal's width has room for, the first ones first."""
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        counts = f"{step}/{self.num_steps} |{'':24}|, "
        text = f"{self._left(step)} left"
        for name, value in shown.items():
            longer = f"{text}  {name} {value}"
            if len(counts) + len(longer) >= columns:
                break
            text = longer
        return text

    def _left(self, step: int) -> str:
        if step == self.num_steps:
            return "0:00"
        if not self._seconds:
            return "?"
        return _clock(sum(self._seconds) / len(self._seconds) * (self.num_steps - step))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
