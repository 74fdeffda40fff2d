"""Prints a mistake that every process of a run has found only once."""

from __future__ import annotations

import hashlib
import os
import time

import torch.distributed as dist

WAIT_SECONDS = 5.0


class ReportedByAnotherProcess(Exception):
    """Raised in place of an error that another process of this run prints; `error` is that error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def first_to_report(text: str) -> bool:
    """True if no other process of the group has asked with the same text before.

    It uses no collective, since other processes may be stuck in one. Rank 0 holds the store that the others ask, so it waits
    until all have asked or WAIT_SECONDS have passed.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        return first_in(store, text, rank=dist.get_rank(), world_size=dist.get_world_size())
    except RuntimeError:  # rank 0 is gone: print the line twice rather than not at all
        return True


def lost_another_process(error: Exception) -> bool:
    """True if a collective failed because another process is gone. gloo, NCCL and their store report it in the message only."""
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "ncclRemoteError",
        "recvValue failed",
    )
    several = dist.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def first_in(store: dist.Store, text: str, *, rank: int, world_size: int) -> bool:
    """True if this is the first process that asks the store with this text."""
    key = f"synpo_fast said {hashlib.sha256(text.encode()).hexdigest()}"
    first = bool(store.add(key, 1) == 1)
    deadline = time.monotonic() + WAIT_SECONDS
    while rank == 0 and store.add(key, 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
    return first
