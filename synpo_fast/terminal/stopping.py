"""Stops a training process on a signal, or when its launcher ends.

During training, SIGTERM, SIGINT (Ctrl-C), SIGHUP and the end of the launcher only set a flag: the loop finishes its step, all
ranks agree, and a checkpoint is saved. At any other time there is nothing to save and the process ends. A second Ctrl-C ends it
immediately; that damages no checkpoint, since a checkpoint is either whole or does not exist.

The `deepspeed` command does not pass a signal on to the process that started the ranks. So each rank watches this chain of
processes: its own parent, if that is a launcher, and the launcher's parent, if that is the `deepspeed` command.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed/launcher/launch.py", "torchrun", "torch.distributed.")
COMMANDS = ("deepspeed.launcher.runner", "/deepspeed ", "/ds ")  # commands that start deepspeed's launcher
LOOK_EVERY_S = 1.0
PATIENCE_S = 10.0  # time for a process to end that is inside a library's call


class Interrupted(KeyboardInterrupt):
    """Raised to end a process that has nothing to save; the message names the cause."""


class Stopper:
    """Handles signals and watches the launcher. reason: the cause of the stop, None if nothing has asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._saves = False
        self._launcher_is_gone = False
        self._must_end_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._ends: tuple[int, int] | None = None

    @property
    def status(self) -> int:
        """The exit status of a run that was stopped and saved: 130 after Ctrl-C, otherwise 0, which schedulers expect."""
        return 130 if self.reason == "SIGINT" else 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals and watches the launcher while the context is active. Call it from the main thread.

        A signal that is already ignored stays ignored.
        """
        reads, writes = self._ends = os.pipe()
        os.set_blocking(writes, False)
        wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                self._before[each] = signal.signal(each, self._note)
        threading.Thread(target=self._watch, args=(reads,), name="synpo_fast stop", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for each, handler in self._before.items():
                signal.signal(each, handler)
            self._before.clear()
            os.close(writes)  # the thread then reads end of file and closes its end

    @contextmanager
    def saves_at_the_end_of_a_step(self) -> Iterator[None]:
        """While the context is active, a request to stop only sets `reason`; the caller checks it and saves."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def cancel_forced_end(self) -> None:
        """Cancels the forced end after Interrupted: the caller has abandoned some work and will end the process itself."""
        self._must_end_at = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            return
        self.reason = "the end of its launcher" if self._launcher_is_gone else signal.Signals(number).name
        if not self._saves:
            raise Interrupted(f"stopped by {self.reason}")

    def _watch(self, reads: int) -> None:
        """Runs in a thread, which continues while the main thread waits in a collective or reads a model."""
        links, interrupts = launcher_links(), 0
        while True:
            if select.select([reads], [], [], LOOK_EVERY_S)[0]:
                came = os.read(reads, 64)
                if not came:
                    os.close(reads)
                    return
                interrupts += came.count(signal.SIGINT)
                if interrupts > 1:
                    _end_now("a second SIGINT", 130)
                if not self._saves and any(number in SIGNALS for number in came):
                    self._must_end_at = self._must_end_at or time.monotonic() + PATIENCE_S
            if not self._launcher_is_gone and is_broken(links):
                self._launcher_is_gone = True
                os.kill(os.getpid(), signal.SIGTERM)
            if self._must_end_at is not None and time.monotonic() > self._must_end_at:
                _end_now(self.reason or "a signal", 143)


def _end_now(reason: str, status: int) -> None:
    os.write(2, f"\nsynpo-fast train: ended by {reason}; checkpoints are unchanged\n".encode())
    os._exit(status)


def launcher_links() -> list[tuple[int, int]]:
    """Returns the (process, parent) pairs that must not change: this process and its launcher, the launcher and the `deepspeed`
    command. Returns none without a launcher, since a run may outlive the shell that started it."""
    own, parent = os.getpid(), os.getppid()
    if not _runs(parent, LAUNCHERS):
        return []
    above = _parent_of(parent)
    links = [(own, parent)]
    if above is not None and _runs(above, COMMANDS):
        links.append((parent, above))
    elif above == 1 and _runs(parent, LAUNCHERS[:2]):
        links.append((parent, -1))  # adopted by init: the command ended before this process started
    return links


def is_broken(links: list[tuple[int, int]]) -> bool:
    """True if a process of a pair now has another parent, or is gone."""
    return any(_parent_of(process) != parent for process, parent in links)


def _runs(process: int, names: tuple[str, ...]) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # the process is gone, or this is not Linux
        return False
    return any(name in words for name in names)


def _parent_of(process: int) -> int | None:
    if process == os.getpid():
        return os.getppid()
    try:
        facts = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    return int(facts.rpartition(")")[2].split()[1])
