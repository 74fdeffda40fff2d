"""Reads one pair from its file to tokens and pixels; with readers that work in the caller's process, without workers."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from synpo_fast.data.encoded import EncodedPair, Encoder, FindStored, PairTooLong
from synpo_fast.data.pair import Pair
from synpo_fast.data.pair_frames import pair_frames
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video_key import video_key


@dataclass(frozen=True)
class BadPair:
    """A pair that cannot be trained on, with the reason."""

    id: str
    reason: str


def quoted(bad: Sequence[BadPair], most: int = 3) -> str:
    """The first `most` bad pairs with their reasons, as part of a message."""
    return "; ".join(
        f"{pair.id!r}: {pair.reason.removeprefix(f'pair {pair.id!r}').lstrip(': ')}" for pair in bad[:most]
    )


@dataclass(frozen=True, eq=False)
class PairReader:
    """Reads a pair: returns an EncodedPair, or a BadPair if two attempts fail. A file system may fail once.

    Errors that the data did not cause, such as a mistake in the set-up or in the code, are raised.

    facts: video_key.reading_facts; if given, every video gets a key. find_stored: looks up a video's features by that key. A
    video with stored features is not decoded.
    """

    encoder: Encoder
    sampling: FrameSampling
    video_root: str | Path | None
    backend: str
    device: torch.device
    deadline_s: float
    facts: str | None = None
    find_stored: FindStored | None = None

    def __call__(self, pair: Pair) -> EncodedPair | BadPair:
        deadline = time.monotonic() + self.deadline_s
        for last in (False, True):
            try:
                return self._read(pair, deadline)
            except PairTooLong as error:
                return BadPair(pair.id, str(error))
            except (ValueError, OSError, MemoryError) as error:
                if last or time.monotonic() > deadline:
                    return BadPair(pair.id, str(error) or type(error).__name__)
        raise AssertionError("the last attempt returns")

    def _read(self, pair: Pair, deadline: float) -> EncodedPair:
        key = self._key(pair)
        if key is not None and self.find_stored is not None:
            # The features are loaded now: their file may be deleted before the pair is used.
            found = self.find_stored(key)
            if found is not None:
                return self.encoder.with_video(pair, found)
        frames, seconds = pair_frames(
            pair,
            self.sampling,
            video_root=self.video_root,
            backend=self.backend,
            device=self.device,
            deadline_s=deadline - time.monotonic(),
        )
        if key is None or frames is None:
            return self.encoder(pair, frames, seconds)
        if not isinstance(pair.video, torch.Tensor) and self._key(pair) != key:
            raise OSError(f"pair {pair.id!r}: its video was changed while it was read")
        return self.encoder.with_video(pair, replace(self.encoder.video_inputs(pair, frames, seconds), key=key))

    def _key(self, pair: Pair) -> str | None:
        return None if self.facts is None else video_key(pair, self.facts, self.video_root)


class ReadOnDemand:
    """Reads a pair in the caller's process, when its result is requested."""

    def __init__(self, reader: PairReader) -> None:
        self.reader = reader
        self.process_ids: list[int] = []

    def submit(self, pair: Pair) -> "Future[Any]":
        return _Deferred(self.reader, pair)

    def close(self) -> None:
        pass


class ReadInThread:
    """Reads ahead in one thread of the caller's process: for decoding on a GPU, which worker processes do not see.

    The thread and the caller both launch on the default stream of the device. So the caller's kernels run after the ones that
    made the result, and its memory is not reused too early.
    """

    def __init__(self, reader: PairReader) -> None:
        self.reader = reader
        self.process_ids: list[int] = []
        self._thread = ThreadPoolExecutor(1, "synpo_fast-reader", initializer=_take_device, initargs=(reader.device,))

    def submit(self, pair: Pair) -> "Future[Any]":
        return self._thread.submit(self.reader, pair)

    def close(self) -> None:
        """Cancels the pairs in the queue and waits for the one that is being read."""
        self._thread.shutdown(cancel_futures=True)


def _take_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread starts on device 0


class _Deferred(Future):  # reads the pair in result(), so that no result waits in memory
    def __init__(self, reader: PairReader, pair: Pair) -> None:
        super().__init__()
        self.reader, self.pair = reader, pair

    def result(self, timeout: float | None = None) -> Any:
        return self.reader(self.pair)
