"""A handle of one worker process in its parent: starts it, sends it messages, ends it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synpo_fast.data.workers.messages import send_message

# A terminal or launcher signals all processes at once. Workers ignore these signals: the parent decides when they end. They are
# not started with `-m`, because only the parent's sys.path finds the package if a script of it was started by path.
START = """
import signal, sys
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_IGN)
_, descriptor, deadline_s, preload, *sys.path = sys.argv
from synpo_fast.data.workers.worker import main
main(int(descriptor), float(deadline_s), preload.split())
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(eq=False)
class WorkerProcess:
    """A running worker.

    task: the item it works on, or None. ready: True once it has loaded its callable. deadline: the time.monotonic() by which
    it must be ready or finish its task.
    """

    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    task: Any = None
    ready: bool = False
    deadline: float = 0.0

    @classmethod
    def start(cls, deadline_s: float, preload: Sequence[str] = ()) -> "WorkerProcess":
        """Starts a worker. preload: modules that it imports while it waits for its callable."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), str(deadline_s), " ".join(preload), *sys.path],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=[theirs.fileno()],
            )
        return cls(process, ours)

    def send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; reading reports that
            send_message(self.connection, message)

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def how_it_ended(self) -> str:
        """Describes how a process with a closed socket ended. Waits for the end if necessary."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=10)
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return f"its worker process {how}"
        return "its worker process closed its connection"
