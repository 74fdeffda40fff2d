"""Interleaved timing: contestants take turns, and their times are compared round by round.

Each contestant runs once in every round, so a machine that slows down affects all of them. The order is reversed every second
round and rotated by one place every two rounds, so no contestant always follows the same one. Results are medians with quartiles
or with the whole range. A ratio is the median over the rounds of (own time / the other's time in the same round).
On a GPU a call is timed with events around it, which include launches and host waits; on a CPU with perf_counter.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Spread = dict[str, float]  # median, low and high

# Larger than any GPU's L2 (50 MB on an H100, 60 MB on an H200, 126 MB on a B200).
_L2_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the lower and upper quartile of `rounds` samples."""

    median: float
    low: float
    high: float
    rounds: int


def summarise(samples: Sequence[float]) -> Timing:
    """The median and quartiles of the samples. Raises ValueError if there are none."""
    if not samples:
        raise ValueError("no samples to summarise")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def spread(values: Sequence[float]) -> Spread:
    """The median, the lowest and the highest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios_by_round(samples: Sequence[float], base: Sequence[float]) -> list[float]:
    """samples / base in each round."""
    return [own / other for own, other in zip(samples, base, strict=True)]


def median_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of samples / base."""
    return statistics.median(ratios_by_round(samples, base))


ROUNDS_FOR_AN_INTERVAL = 5  # the true median lies outside the range of n values with probability 2 ** (1 - n)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of at least 90 % for the true median: two of the values, valid for any distribution.

    With fewer than eight values it is their whole range. With fewer than ROUNDS_FOR_AN_INTERVAL its confidence is lower: 75 % for
    three values. (The interval between the quartiles is narrower: it holds half of the values.)
    """
    rising = sorted(values)
    cut = 0
    while 2 * sum(math.comb(len(rising), k) for k in range(cut + 2)) <= 0.1 * 2 ** len(rising):
        cut += 1
    return rising[cut], rising[-1 - cut]


def round_order(contestants: Sequence[T], round_index: int) -> list[T]:
    """The order of one round: rotated by one place every two rounds, and reversed every second round."""
    turn = round_index // 2 % len(contestants)
    order = [*contestants[turn:], *contestants[:turn]]
    return order[::-1] if round_index % 2 else order


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device,
    cold_l2: bool = False,
    budget_seconds: float = float("inf"),
    min_rounds: int = 3,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round. There is no warm-up: make each call once or twice before.

    Stops before `rounds` once `budget_seconds` are spent, but not before `min_rounds`. `cold_l2` overwrites the GPU's L2 cache
    before every call. `timer(call) -> seconds` replaces the clock.
    """
    if not calls:
        return {}
    if timer is None:
        timer = _cuda_timer(device, cold_l2) if device.type == "cuda" else _cpu_timer
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()  # so that collections between rounds look only at new objects
    gc.disable()
    try:
        for round_index in range(rounds):
            for name in round_order(list(calls), round_index):
                samples[name].append(timer(calls[name]))
            gc.collect()
            if round_index + 1 >= min_rounds and time.perf_counter() - start > budget_seconds:
                break
    finally:
        gc.enable()
        if not frozen:  # otherwise the caller has frozen objects of its own
            gc.unfreeze()
    return samples


def _cpu_timer(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _cuda_timer(device: torch.device, cold_l2: bool) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device) if cold_l2 else None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timer(call: Callable[[], Any]) -> float:
        if flush is not None:
            flush.zero_()
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(end) / 1e3

    return timer
