"""A lock that keeps two runs out of one output folder.

It is the kernel's lock on `run.lock` (flock): it goes with the process that holds it, whatever that one died of, so a file
that a killed run left behind bars nobody. The file names process, machine and time for whoever is turned away.
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
    """Held from its making until release(). Raises ValueError, naming the other process, where another run holds it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._descriptor: int | None = self._take()

    def _take(self) -> int:
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise UserError(
                    f"output_dir={str(self.file.parent)!r} is in use by another run{holder}: wait for it or end it, or give "
                    "another output_dir"
                ) from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    os.close(descriptor)
                    raise
                logger.warning("%s cannot be locked on this file system (%s): start one run only", self.file, error)
            if self._is_still_there(descriptor):
                break
            os.close(descriptor)  # its last holder removed it meanwhile: this lock would keep nobody out
        facts = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(facts) + "\n").encode(), 0)
        return descriptor

    def _is_still_there(self, descriptor: int) -> bool:
        try:
            there = self.file.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(descriptor)
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        if self._descriptor is not None:
            if self._is_still_there(self._descriptor):
                self.file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.pread(descriptor, 4096, 0))
        return f" (process {facts['pid']} on {facts['host']}, since {facts['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is being written this moment
        return ""
