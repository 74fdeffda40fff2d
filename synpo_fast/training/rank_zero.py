"""Work that one process does for all: its result, or its error, reaches every rank, so that none waits for another for ever."""

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
    """Says what failed, with the file if the system names one, and the way out."""
    advice = ADVICE.get(error.errno or 0)
    return f"a file could not be read or written: {error}" + (f" ({advice})" if advice else "")


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Every rank calls it. The result must be picklable; so must an error, which is raised on every rank.

    An OSError, of a disk that is full or a folder that may not be written, becomes a UserError with the same text.
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
