"""How a training process is told to end, and by whom.

While steps are trained SIGTERM, SIGINT (Ctrl-C), SIGHUP and the end of the launcher are noted; the loop finishes its step, all
ranks agree, and a checkpoint is saved. At any other time there is nothing to save, and the process ends. A second Ctrl-C ends
it at once; checkpoints are whole or not there, so that harms none.

The `deepspeed` command does not pass a signal on to the process that started the ranks. So each rank looks at that chain: its
own parent, if that is a launcher, and the launcher's parent, if that is the `deepspeed` command.
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
COMMANDS = ("deepspeed.launcher.runner", "/deepspeed ", "/ds ")  # what starts deepspeed's launcher
LOOK_EVERY_S = 1.0
PATIENCE_S = 10.0  # for a process that is to end but does not come out of a library's call


class Interrupted(KeyboardInterrupt):
    """Ends a process that has nothing to save; the message names what asked for it."""


class Stopper:
    """reason: what asked this process to stop, None if nothing has."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._saves = False
        self._launcher_is_gone = False
        self._must_end_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._ends: tuple[int, int] | None = None

    @property
    def status(self) -> int:
        """Exit status of a run that was stopped and saved: 0, as schedulers like it, but 130 after Ctrl-C."""
        return 130 if self.reason == "SIGINT" else 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles signals and watches the launcher inside; from the main thread. A signal that is ignored stays so."""
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
            os.close(writes)  # the thread reads to the end, and closes its own

    @contextmanager
    def saves_at_the_end_of_a_step(self) -> Iterator[None]:
        """Inside, whoever asks is only noted: the caller looks at `reason` and saves."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False

    def goes_on(self) -> None:
        """Something was given up because of Interrupted, but the process ends in its own time."""
        self._must_end_at = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            return
        self.reason = "the end of its launcher" if self._launcher_is_gone else signal.Signals(number).name
        if not self._saves:
            raise Interrupted(f"stopped by {self.reason}")

    def _watch(self, reads: int) -> None:
        """In a thread: it runs on where the main thread waits in a collective, or for a model to be read."""
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
    os.write(2, f"\nsynpo-fast train: ended by {reason}; checkpoints are as they were\n".encode())
    os._exit(status)


def launcher_links() -> list[tuple[int, int]]:
    """(process, its parent) pairs that must stay as they are: this process and its launcher, and that one and the `deepspeed`
    command. Without a launcher there are none: a run may outlive the shell that started it."""
    own, parent = os.getpid(), os.getppid()
    if not _runs(parent, LAUNCHERS):
        return []
    above = _parent_of(parent)
    links = [(own, parent)]
    if above is not None and _runs(above, COMMANDS):
        links.append((parent, above))
    elif above == 1 and _runs(parent, LAUNCHERS[:2]):
        links.append((parent, -1))  # adopted by init: the command ended before this process had begun
    return links


def is_broken(links: list[tuple[int, int]]) -> bool:
    return any(_parent_of(process) != parent for process, parent in links)


def _runs(process: int, names: tuple[str, ...]) -> bool:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it is gone, or this is no Linux
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
