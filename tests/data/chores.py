"""Work for worker processes, importable there."""

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data.encoded import EncodedPair, PairTooLong
from synpo_fast.data.pair import Pair
from synpo_fast.models.families.registry import VideoInputs
from synpo_fast.models.policy import Sample


def do(item: tuple[str, Any]) -> Any:
    """item: (what, argument)."""
    what, argument = item
    return CHORES[what](argument)


def _crash_once(flag: str) -> str:
    if not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return "done the second time"


def _fail(message: str) -> None:
    raise KeyError(message)


def _sleep_holding_the_lock(_: Any) -> None:
    ctypes.PyDLL(None).sleep(60)


def _linger(argument: tuple[float, Any]) -> Any:
    time.sleep(argument[0])
    return argument[1]


CHORES = {
    "double": lambda tensor: tensor * 2,
    "echo": lambda argument: argument,
    "linger": _linger,
    "crash": lambda number: os.kill(os.getpid(), number),
    "crash once": _crash_once,
    "exit": os._exit,
    "fail": _fail,
    "lambda": lambda _: lambda: None,
    "hang": _sleep_holding_the_lock,
    "facts": lambda _: (os.getpid(), torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES")),
}


class BrokenOnArrival:
    """Can be pickled but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _fail, ("this machine lacks a library",)


class EndsOnArrival:
    def __reduce__(self) -> Any:
        return os._exit, (7,)


@dataclass(frozen=True)
class LightEncoder:
    """In place of a PairEncoder: keeps the frames, and does what the pair's text says."""

    def __call__(self, pair: Pair, frames: Tensor | None, seconds_per_frame: float | None) -> EncodedPair:
        if pair.chosen == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if pair.chosen == "hang":
            _sleep_holding_the_lock(60)
        if pair.chosen == "too long":
            raise PairTooLong(f"pair {pair.id!r} needs 100 tokens")
        if pair.chosen == "bug":
            raise KeyError(pair.id)
        if pair.chosen.startswith("fail once "):
            flag = Path(pair.chosen.removeprefix("fail once "))
            if not flag.exists():
                flag.touch()
                raise OSError("the file system is tired")
        video = None if frames is None else VideoInputs({"frames": frames}, (7,), 7, seconds_per_frame)
        return EncodedPair(Sample((1, 7), ((2,), (3,)), video, pair.id), pair.id)
