"""Steps that are read before they are asked for, as many as a bound on their bytes allows.

The next step is always read whole, since nothing goes on without it. Of the steps behind it a pair is given to the readers only
if a pair as large as the largest of late would still fit in beside what is held and what is being read. That is a guess: where
it was wrong, the results farthest from their turn are let go until the rest is within the bound, and read again later. So
whatever sizes come, the bytes held are at most the bound, or those of the next step alone where it is larger.

What is read when depends on sizes and on who is faster. What a step holds, and in which order, does not.
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

RECENT = 64  # pairs whose largest is the guess for the next one


class Source(Protocol):
    def submit(self, pair: Pair) -> Future[Any]: ...


@dataclass(eq=False)
class Slot:
    """One pair of a step. future: None while it is not being read. num_bytes: known when it has arrived."""

    pair: Pair
    future: Future[Any] | None = None
    num_bytes: int | None = None


@dataclass(eq=False)
class PendingStep:
    epoch: int
    step: int
    slots: list[Slot]


class ReadAhead:
    """Steps in the order of their turn; the first one is the next that is asked for.

    num_reread counts results that were let go.
    """

    def __init__(self, source: Source, max_bytes: int) -> None:
        self.source, self.max_bytes = source, max_bytes
        self.steps: deque[PendingStep] = deque()
        self.num_reread = 0
        self._recent: deque[int] = deque(maxlen=RECENT)
        # Results arrive in another thread. Reentrant, because cancelling a future calls back.
        self._lock = threading.RLock()
        self._submitting = self._submit_again = False

    @property
    def held_bytes(self) -> int:
        """Bytes of the results that have arrived and were not yet taken."""
        with self._lock:
            return sum(slot.num_bytes or 0 for slot in self._slots())

    def add(self, step: PendingStep) -> None:
        with self._lock:
            self.steps.append(step)

    def drop(self) -> None:
        """Forgets all steps. What is being read at this moment is read to its end and let go."""
        with self._lock:
            steps = list(self.steps)
            self.steps.clear()
            for step in steps:
                for slot in step.slots:
                    future, slot.future = slot.future, None
                    if future is not None:
                        future.cancel()

    def take(self) -> Iterator[tuple[Pair, Future[Any]]]:
        """The first step's pairs with their futures, in order. The step is gone when all of them were taken."""
        self.submit()
        with self._lock:
            step = self.steps[0]
        for slot in step.slots:
            assert slot.future is not None
            yield slot.pair, slot.future
        with self._lock:
            for slot in step.slots:
                if slot.num_bytes is None and slot.future is not None:  # a source that reads when it is asked
                    self._recent.append(_num_bytes(slot.future))
                slot.future = None  # which knows the slot, and would live on with its result until a garbage collection
            if self.steps and self.steps[0] is step:
                self.steps.popleft()

    def submit(self) -> None:
        """Gives the readers what the bound allows."""
        with self._lock:
            if self._submitting:  # called back from a future that was done at once
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
                return  # nobody wants it any more
            slot.num_bytes = _num_bytes(future)
            if future.exception() is not None:
                return  # who takes it will see; the readers may be gone
            self._recent.append(slot.num_bytes)
            self._let_go()
            self.submit()

    def _let_go(self) -> None:
        """Lets go of the results farthest from their turn, until the rest is within the bound."""
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
