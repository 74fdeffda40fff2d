"""The time of an optimiser step by stage, each moment counted once.

A stack says which stage runs; entering and leaving one closes an interval, which is charged to the stage on top. So a collective
inside the backward is communication and not backward, and the stages sum to the step. Inside `reference` everything is the
reference's. The language model runs prefixes and responses in one row: its time is divided by their shares of the rows.

On a GPU the borders are events in the stream: nothing waits until the step is over, so the step runs as it does in training.
The step itself is timed with the host's clock, apart from the borders.

`timed_stages` puts the clock around methods of one engine, its policy and torch's process groups, and takes it off again.
A run that is not profiled never meets it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.models.layout import RowLayout

WAIT, VISION, PREFIX, RESPONSES, HEAD = "wait for data", "vision", "prefix", "responses", "head and loss"
REFERENCE, BACKWARD, OPTIMISER, COMMUNICATION, OTHER = "reference", "backward", "optimiser", "communication", "other"
STAGES = (WAIT, VISION, PREFIX, RESPONSES, HEAD, REFERENCE, BACKWARD, OPTIMISER, COMMUNICATION, OTHER)
Shares = Mapping[str, float]  # stages that run at once, and which part of the time is whose

# What torch.distributed and DeepSpeed end in, whichever of their functions was called. Names vary between torch versions.
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "all_gather_single",
    "all_gather_single_coalesced", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "alltoall", "alltoall_base", "all_to_all_single",
    "send", "recv", "recv_anysource", "_end_coalescing",
)  # fmt: skip


@dataclass(frozen=True)
class StageTimes:
    """seconds: the whole step by the host's clock. stages: every one of STAGES."""

    seconds: float
    stages: dict[str, float]


class StageClock:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stack: list[Shares] = []  # empty: no step is being timed
        self._intervals: list[tuple[Shares, Any, Any]] = []
        self._last: Any = None
        self._began = 0.0

    def start(self) -> None:
        assert not self._stack
        self._intervals = []
        self._wait()
        self._began = time.perf_counter()
        self._stack = [{OTHER: 1.0}]
        self._last = self._mark()

    def stop(self) -> StageTimes:
        assert len(self._stack) == 1, self._stack
        self._close_interval()
        self._stack = []
        self._wait()
        seconds = time.perf_counter() - self._began
        stages = dict.fromkeys(STAGES, 0.0)
        for shares, begin, end in self._intervals:
            passed = end - begin if self.device.type != "cuda" else begin.elapsed_time(end) / 1e3
            for stage, share in shares.items():
                stages[stage] += share * passed
        return StageTimes(seconds, stages)

    @contextmanager
    def stage(self, shares: Shares) -> Iterator[None]:
        """Does nothing between steps."""
        if not self._stack or REFERENCE in self._stack[-1]:
            yield
            return
        self._close_interval()
        self._stack.append(shares)
        try:
            yield
        finally:
            self._close_interval()
            self._stack.pop()

    def timed(self, call: Callable[..., Any], shares_of: Callable[..., Shares]) -> Callable[..., Any]:
        """`call` inside the stage that shares_of makes of its arguments."""

        @functools.wraps(call)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.stage(shares_of(*args, **kwargs)):
                return call(*args, **kwargs)

        return inside

    def _close_interval(self) -> None:
        mark = self._mark()
        self._intervals.append((self._stack[-1], self._last, mark))
        self._last = mark

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def whole(stage: str) -> Callable[..., Shares]:
    shares = {stage: 1.0}
    return lambda *_, **__: shares


def row_shares(row: RowLayout, *_: Any, **__: Any) -> Shares:
    """The shares of a packed row's tokens that stand in prefixes and in responses."""
    prefix = sum(group.prefix.length for group in row.groups) / row.length
    return {PREFIX: prefix, RESPONSES: 1.0 - prefix}


@contextmanager
def timed_stages(clock: StageClock, engine: Any) -> Iterator[None]:
    """engine: training.engine.Engine."""
    module, policy = engine.module, engine.module.policy
    places: list[tuple[Any, str, Callable[..., Shares]]] = [
        (policy, "encode_videos", whole(VISION)),
        (policy, "hidden_states", row_shares),
        (policy, "_row_logps", whole(HEAD)),
        (module, "reference_logps", whole(REFERENCE)),
        (module, "loss_of_logps", whole(HEAD)),
        (engine, "backward", whole(BACKWARD)),
        (engine, "step", whole(OPTIMISER)),
    ]
    known = [name for name in COLLECTIVES if name in vars(dist.ProcessGroup)]
    places += [(dist.ProcessGroup, name, whole(COMMUNICATION)) for name in known]
    places.append((dist.Work, "wait", whole(COMMUNICATION)))
    before: list[tuple[Any, str, dict[str, Any]]] = []
    try:
        for owner, name, shares_of in places:
            # The owner's own entry: a method looked up on it is not what its class holds.
            before.append((owner, name, {key: own for key, own in vars(owner).items() if key == name}))
            setattr(owner, name, clock.timed(getattr(owner, name), shares_of))
        yield
    finally:
        for owner, name, held in before:
            if held:
                setattr(owner, name, held[name])
            else:
                delattr(owner, name)  # the class's own is visible again
