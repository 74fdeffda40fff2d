"""Splits the time of an optimiser step by stage; each moment counts for one stage only.

A stack holds the running stages. Entering or leaving a stage closes an interval, which is charged to the stage on top. So a
collective inside the backward counts as communication and not as backward, and the stages sum to the step. All time inside
`reference` counts for the reference. The language model runs prefixes and responses in one row, so its time is divided in
proportion to their tokens.

On a GPU the intervals are bounded by events in the stream. The host waits for them only after the step, so the step runs as in
training. The whole step is also timed with the host's clock, independently of the intervals.

`timed_stages` wraps methods of one engine, its policy and torch's process groups, and restores them afterwards. A run without a
profile does not use this module.
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
Shares = Mapping[str, float]  # stages that run at the same time -> their shares of the time, which sum to 1

# Methods of a process group that every function of torch.distributed and DeepSpeed calls. Names vary between torch versions.
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "reduce", "broadcast", "barrier", "gather", "scatter",
    "allgather", "allgather_coalesced", "allgather_into_tensor_coalesced", "_allgather_base", "all_gather_single",
    "all_gather_single_coalesced", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced", "_reduce_scatter_base", "alltoall", "alltoall_base", "all_to_all_single",
    "send", "recv", "recv_anysource", "_end_coalescing",
)  # fmt: skip


@dataclass(frozen=True)
class StageTimes:
    """The times of one step. seconds: the whole step by the host's clock. stages: seconds of each of STAGES."""

    seconds: float
    stages: dict[str, float]


class StageClock:
    """Measures the stages of one step at a time, between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stack: list[Shares] = []  # empty while no step is timed
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
        """Charges the time inside the `with` block to these stages. Does nothing between steps and inside `reference`."""
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
        """Wraps `call` so that its time is charged to the stages that shares_of returns for its arguments."""

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


def only(stage: str) -> Callable[..., Shares]:
    """A shares_of that charges all time to one stage."""
    shares = {stage: 1.0}
    return lambda *_, **__: shares


def row_shares(row: RowLayout, *_: Any, **__: Any) -> Shares:
    """The shares of a packed row's tokens that belong to prefixes and to responses."""
    prefix = sum(group.prefix.length for group in row.groups) / row.length
    return {PREFIX: prefix, RESPONSES: 1.0 - prefix}


@contextmanager
def timed_stages(clock: StageClock, engine: Any) -> Iterator[None]:
    """Wraps the methods of the engine (training.engine.Engine) that belong to a stage, and restores them at the end."""
    module, policy = engine.module, engine.module.policy
    places: list[tuple[Any, str, Callable[..., Shares]]] = [
        (policy, "encode_videos", only(VISION)),
        (policy, "hidden_states", row_shares),
        (policy, "_logps", only(HEAD)),
        (policy, "_outputs", only(HEAD)),
        (module, "reference_logps", only(REFERENCE)),
        (module, "loss_of_logps", only(HEAD)),
        (engine, "backward", only(BACKWARD)),
        (engine, "step", only(OPTIMISER)),
    ]
    known = [name for name in COLLECTIVES if name in vars(dist.ProcessGroup)]
    places += [(dist.ProcessGroup, name, only(COMMUNICATION)) for name in known]
    places.append((dist.Work, "wait", only(COMMUNICATION)))
    before: list[tuple[Any, str, dict[str, Any]]] = []
    try:
        for owner, name, shares_of in places:
            # Only the owner's own attribute: a method of its class is not in vars(owner), and is restored by deleting.
            before.append((owner, name, {key: own for key, own in vars(owner).items() if key == name}))
            setattr(owner, name, clock.timed(getattr(owner, name), shares_of))
        yield
    finally:
        for owner, name, held in before:
            if held:
                setattr(owner, name, held[name])
            else:
                delattr(owner, name)  # makes the method of the class visible again
