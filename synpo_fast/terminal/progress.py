"""Shows the progress of a run: a bar in a terminal, otherwise one line per logged step."""

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
BAR = "{n_fmt}/{total_fmt} |{bar:24}|{postfix}"  # fixed width: the length of the numbers changes with every step
STEPS_FOR_TIME_LEFT = 50


class Progress:
    """Shows progress on one rank: a bar in a terminal (if `bar`), otherwise a line every `every` steps.

    The lines are emitted as events (events.py) in either case. The time left is the mean time of the last steps times the number
    of remaining steps. It includes no evaluations and checkpoints. This process's first step is not part of the mean, because it
    waits for the first videos and for compilation.
    """

    def __init__(self, *, shows: bool, bar: bool, first_step: int, num_steps: int, every: int) -> None:
        self.tells, self.num_steps, self.every = shows, num_steps, every
        self.shows = shows  # becomes False when the terminal or the pipe's reader is gone
        self.first_step = first_step
        self._seconds: deque[float] = deque(maxlen=STEPS_FOR_TIME_LEFT)
        self._bar: Any = None
        if shows and bar and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=num_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR)

    def show(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
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
            with self._while_readable():
                self._bar.set_postfix_str(self._fitting(step, shown), refresh=False)
                self._bar.update(step - self._bar.n)
                self._bar.refresh()

    def note(self, numbers: Mapping[str, Any]) -> None:
        """Shows an evaluation's numbers and captions."""
        if not self.tells:
            return
        facts = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, float))
        self.say(f"evaluation: {facts}", "evaluation")
        for row in numbers.get("eval_captions", []):
            self.say(f"  {printable_line(row['id'])}: {printable_line(row['caption'][:300])}", "caption")

    def say(self, text: str, kind: Kind = "note") -> None:
        """Prints one or more lines and emits them as an event."""
        if self.tells:
            emit(kind, text)
            self._print(text)

    def _print(self, text: str | None) -> None:
        """Prints a line with control characters escaped, since names and captions in it are not ours."""
        if text is None or not self.shows:
            return
        text = printable(text)
        with self._while_readable():
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with self._while_readable():
                self._bar.close()

    @contextmanager
    def _while_readable(self) -> Iterator[None]:
        """Stops printing at the first OSError: a closed terminal, or a pipe without a reader, must not end the run."""
        try:
            yield
        except OSError:
            self.shows = False

    def _fitting(self, step: int, shown: Mapping[str, str]) -> str:
        """Returns the time left and as many of the numbers, from the first on, as fit the terminal's width."""
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
