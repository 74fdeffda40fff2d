"""One worker process as its parent sees it: started, spoken to, ended."""

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

# Signals reach the whole group, or all of a launcher's processes, but the parent decides what ends. And not `-m`: the parent's
# own sys.path says where the package is, also when a script of it was started by path.
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
    """task: what it works on, None if nothing; ready: whether it has its callable; deadline: of either, time.monotonic()."""

    process: "subprocess.Popen[bytes]"
    connection: socket.socket
    task: Any = None
    ready: bool = False
    deadline: float = 0.0

    @classmethod
    def start(cls, deadline_s: float, preload: Sequence[str] = ()) -> "WorkerProcess":
        """preload: modules that it imports at once, while it waits for its callable."""
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
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which reading from it will tell
            send_message(self.connection, message)

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()

    def how_it_ended(self) -> str:
        """Of a process whose socket is closed: it is over, or about to be."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=10)
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            return f"its worker process {how}"
        return "its worker process closed its connection"
