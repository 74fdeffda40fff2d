"""Runs work on rank 0 for all ranks. Its result or its error reaches every rank, so that no rank waits forever."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from synpo_fast.errors import UserError

Result = TypeVar("Result")


ADVICE = {
    errno.ENOSPC: "the disk is full: free some room, then start again with the same command",
    errno.EDQUOT: "the quota is used up: free some room, then start again with the same command",
    errno.EACCES: "change its permissions, or give another folder",
    errno.EROFS: "give a folder that can be written",
}


def _os_error_text(error: OSError) -> str:
    """The error's text, with the file if the system names one, and advice."""
    advice = ADVICE.get(error.errno or 0)
    return f"a file could not be read or written: {error}" + (f" ({advice})" if advice else "")


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Runs `work` on rank 0 and returns its result on every rank. Every rank calls it. Result and error must be picklable.

    An error is raised on every rank. An OSError, such as a full disk or a read-only folder, becomes a UserError with its text.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except OSError as error:
            answer[1] = UserError(_os_error_text(error))
        except (ValueError, RuntimeError, ImportError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    result: Result = answer[0]
    return result
