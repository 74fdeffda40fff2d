"""One line on the screen for a mistake that every process of a run has found."""

from __future__ import annotations

import hashlib
import os
import time

import torch.distributed as dist

WAIT_SECONDS = 5.0


class SaidByAnotherProcess(Exception):
    """In place of an error that another process of this run shows; `error` is that error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def first_to_say(text: str) -> bool:
    """Whether no other process of the group has come with the same text. It needs no collective: others may be stuck in one.

    The first process holds the store that the others ask, so it stays until they have asked, or WAIT_SECONDS have passed.
    """
    try:
        store = dist.distributed_c10d._get_default_store()
        return first_in(store, text, rank=dist.get_rank(), world_size=dist.get_world_size())
    except RuntimeError:  # the first process is gone: rather a line twice than not at all
        return True


def lost_another_process(error: Exception) -> bool:
    """Whether a collective failed because a process at the other end is gone: gloo, NCCL and their store say it in words only."""
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
    key = f"synpo_fast said {hashlib.sha256(text.encode()).hexdigest()}"
    first = bool(store.add(key, 1) == 1)
    deadline = time.monotonic() + WAIT_SECONDS
    while rank == 0 and store.add(key, 0) < world_size and time.monotonic() < deadline:
        time.sleep(0.05)
    return first
