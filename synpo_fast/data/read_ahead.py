"""Reads steps before they are needed, as many as a limit on their bytes allows.

The next step is always read in full, since training needs it to continue. A pair of a later step is submitted only if a pair as
large as the largest recent one would still fit beside the results that are held or being read. That is an estimate. If it was
too low, the results needed last are dropped until the rest is within the limit, and are read again later. So the bytes held
never exceed the limit, or the size of the next step if that alone is larger.

The order of reading depends on sizes and timing. The content of a step and the order of its pairs do not.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.encoding import BadPair
from synpo_fast.data.pair import Pair

RECENT = 64  # pairs; the largest of them is the estimate for the next one


class Source(Protocol):
    def submit(self, pair: Pair) -> Future[Any]: ...


@dataclass(eq=False)
class Slot:
    """One pair of a step. future: None until it is submitted. num_bytes: None until the result has arrived."""

    pair: Pair
    future: Future[Any] | None = None
    num_bytes: int | None = None


@dataclass(eq=False)
class PendingStep:
    epoch: int
    step: int
    slots: list[Slot]


class ReadAhead:
    """A queue of steps that are read ahead. The first step is the next one to be taken.

    num_reread counts the results that were dropped and read again.
    """

    def __init__(self, source: Source, max_bytes: int) -> None:
        self.source, self.max_bytes = source, max_bytes
        self.steps: deque[PendingStep] = deque()
        self.num_reread = 0
        self._recent: deque[int] = deque(maxlen=RECENT)
        # Results arrive in another thread. The lock is reentrant because cancelling a future calls _arrived.
        self._lock = threading.RLock()
        self._submitting = self._submit_again = False

    @property
    def held_bytes(self) -> int:
        """The bytes of the results that have arrived and have not been taken."""
        with self._lock:
            return sum(slot.num_bytes or 0 for slot in self._slots())

    def add(self, step: PendingStep) -> None:
        with self._lock:
            self.steps.append(step)

    def drop(self) -> None:
        """Removes all steps. Reads in progress finish, and their results are discarded."""
        with self._lock:
            steps = list(self.steps)
            self.steps.clear()
            for step in steps:
                for slot in step.slots:
                    future, slot.future = slot.future, None
                    if future is not None:
                        future.cancel()

    def take(self) -> Iterator[tuple[Pair, Future[Any]]]:
        """Yields the first step's pairs with their futures, in order, and then removes the step."""
        self.submit()
        with self._lock:
            step = self.steps[0]
        for slot in step.slots:
            assert slot.future is not None
            yield slot.pair, slot.future
        with self._lock:
            for slot in step.slots:
                if slot.num_bytes is None and slot.future is not None:  # a source that reads in result()
                    self._recent.append(_num_bytes(slot.future))
                slot.future = None  # breaks a reference cycle that would keep the result until a garbage collection
            if self.steps and self.steps[0] is step:
                self.steps.popleft()

    def submit(self) -> None:
        """Submits as many pairs as the limit allows."""
        with self._lock:
            if self._submitting:  # called by a future that was done at once
                self._submit_again = True
                return
            self._submitting = True
            try:
                self._submit_again = True
                while self._submit_again:
                    self._submit_again = False
                    self._submit_in_order()
            finally:
                self._submitting = False

    def _submit_in_order(self) -> None:
        for place, step in enumerate(self.steps):
            for slot in step.slots:
                if slot.future is not None:
                    continue
                if place and not self._has_room():
                    return
                slot.future = self.source.submit(slot.pair)
                slot.future.add_done_callback(functools.partial(self._arrived, slot))

    def _has_room(self) -> bool:
        if not self._recent:
            return False
        being_read = sum(1 for slot in self._slots() if slot.future is not None and slot.num_bytes is None)
        return self.held_bytes + (being_read + 1) * max(self._recent) <= self.max_bytes

    def _arrived(self, slot: Slot, future: Future[Any]) -> None:
        with self._lock:
            if slot.future is not future or future.cancelled():
                return  # dropped or cancelled in the meantime
            slot.num_bytes = _num_bytes(future)
            if future.exception() is not None:
                return  # take() passes the error on; the readers may be closed
            self._recent.append(slot.num_bytes)
            self._drop_excess()
            self.submit()

    def _drop_excess(self) -> None:
        """Drops the results that are needed last, until the rest is within the limit."""
        too_many = self.held_bytes - self.max_bytes
        for step in reversed(list(self.steps)[1:]):
            for slot in reversed(step.slots):
                if too_many <= 0:
                    return
                if slot.num_bytes:
                    too_many -= slot.num_bytes
                    slot.future = slot.num_bytes = None
                    self.num_reread += 1

    def _slots(self) -> Iterator[Slot]:
        return (slot for step in self.steps for slot in step.slots)


def _num_bytes(future: Future[Any]) -> int:
    if not future.done() or future.exception() is not None:
        return 0
    result: EncodedPair | BadPair = future.result()
    return 0 if isinstance(result, BadPair) else result.num_bytes
