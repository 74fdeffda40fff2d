"""One contest: every contestant checked against the truth, its memory taken, then all of them timed in turn.

Each contestant makes one call whose result is checked (and which compiles and tunes), then the memory calls, and after
the timed rounds one more checked call, so that a result that is right only at times is found too. Speed and memory are
reported only for those that passed both checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from synpo_fast.profiling.peak_memory import peak_extra_memory
from synpo_fast.profiling.rounds import interleave, median_ratio, summarise


class Unavailable(Exception):
    """This contestant cannot run this case; the message says why and goes into its row."""


@dataclass(frozen=True)
class Step:
    """`run()` does all that is timed, once; `setting` says in words how the peer is called.

    A step with `exact=False` computes nothing to check (a floor): its result is ignored, and since its buffers are made
    beforehand, it has no peak memory.
    """

    run: Callable[[], Any]
    setting: str
    exact: bool = True


# Judges a step's result: (errors by name, reason it is wrong or None).
Judge = Callable[[Any], tuple[dict[str, float], str | None]]


@dataclass(frozen=True)
class Options:
    """How a case is measured: the rounds end after `budget_seconds` (but not before three of them)."""

    device: torch.device
    rounds: int
    budget_seconds: float
    cold_l2: bool = False
    seed: int = 0


@dataclass
class Row:
    name: str
    setting: str = ""
    step: Step | None = None
    error: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    skipped: str | None = None
    faulty: bool = False  # wrong or crashed, as opposed to not available

    def fail(self, reason: str, *, faulty: bool) -> None:
        self.skipped, self.faulty, self.step = reason, faulty, None


def describe(error: BaseException) -> str:
    """The exception's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def attempt(row: Row, work: Callable[[], Any]) -> Any:
    """work(), or None with the reason written into the row: other people's packages fail in every possible way."""
    try:
        return work()
    except (Unavailable, ImportError) as error:
        row.fail(str(error) if isinstance(error, Unavailable) else describe(error), faulty=False)
    except Exception as error:
        row.fail(describe(error), faulty=True)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # what the failed call reserved must not starve the next
    return None


def judge_row(row: Row, judge: Judge) -> None:
    """Runs the step once and writes errors into the row, and the reason where it fails or is wrong."""
    step = row.step
    if step is None:
        return
    result = attempt(row, step.run)
    if row.step is None or not step.exact:
        return
    judged = attempt(row, lambda: judge(result))
    if judged is not None:
        row.error, reason = judged
        if reason is not None:
            row.fail(f"WRONG: {reason}", faulty=True)


def run_contest(
    prepare: dict[str, Callable[[], Step]],
    judge: Judge,
    *,
    floor: str,
    options: Options,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one case, as they go into the JSON: in the order of `prepare`."""
    rows = [Row(name) for name in prepare]
    for row in rows:
        row.step = attempt(row, prepare[row.name])
        row.setting = row.step.setting if row.step is not None else ""
        judge_row(row, judge)
        if row.step is not None and row.step.exact:
            row.memory = attempt(row, partial(peak_extra_memory, row.step.run, options.device)) or {}
    steps = {row.name: row.step.run for row in rows if row.step is not None}
    samples = interleave(
        steps,
        rounds=options.rounds,
        device=options.device,
        cold_l2=options.cold_l2,
        budget_seconds=options.budget_seconds,
        timer=timer,
    )
    for row in rows:
        row.samples = samples.get(row.name, [])
        judge_row(row, judge)
    return [row_record(row, samples.get(floor)) for row in rows]


def row_record(row: Row, floor: list[float] | None) -> dict[str, Any]:
    shown = row.skipped is None
    memory = row.memory if shown else {}
    record: dict[str, Any] = {
        "name": row.name,
        "setting": row.setting,
        "seconds": None,
        "ratio_to_floor": None,
        "peak_extra_bytes": memory.get("peak"),
        "peak_views": {name: count for name, count in memory.items() if name != "peak"},
        # JSON has no NaN or infinity: such an error is a string.
        "error": {name: error if math.isfinite(error) else str(error) for name, error in row.error.items()},
        "skipped": row.skipped,
        "faulty": row.faulty,
    }
    if shown:
        timing = summarise(row.samples)
        record["seconds"] = {
            "median": timing.median,
            "low": timing.low,
            "high": timing.high,
            "rounds": timing.rounds,
            "samples": row.samples,
        }
        record["ratio_to_floor"] = median_ratio(row.samples, floor) if floor else None
    return record
