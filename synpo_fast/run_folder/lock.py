"""A lock that prevents two runs from using one output folder.

It is the kernel's lock on the file `run.lock` (flock). The kernel releases it when the process that holds it ends for any reason,
so a file left by a killed run blocks no other run. The file holds process, machine and time for the error message of another run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
from pathlib import Path

from synpo_fast.errors import UserError

LOCK = "run.lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
logger = logging.getLogger(__name__)


class RunLock:
    """Holds the lock from its creation until release(). Raises UserError, naming the other process, if another run holds it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._descriptor: int | None = self._acquire()

    def _acquire(self) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise UserError(
                    f"output_dir={str(self.file.parent)!r} is in use by another run{holder}: wait for that run, end it, "
                    "or give another output_dir"
                ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    os.close(descriptor)
                    raise
                logger.warning(
                    "%s cannot be locked on this file system (%s): start only one run in this folder", self.file, error
                )
            if self._is_the_locked_file(descriptor):
                break
            os.close(descriptor)  # its last holder has deleted the file, so this lock would not block another run
        facts = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(facts) + "\n").encode(), 0)
        return descriptor

    def _is_the_locked_file(self, descriptor: int) -> bool:
        try:
            there = self.file.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        """Deletes the file and releases the lock. Does nothing the second time."""
        if self._descriptor is not None:
            if self._is_the_locked_file(self._descriptor):
                self.file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f" (process {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # the other process is writing it at this moment
        return ""
