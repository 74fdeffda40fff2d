"""One contest: checks every contestant against the truth, measures its memory, then times all of them in turn.

The first call of each contestant is checked; it also compiles and tunes. Then its memory is measured. After the timed rounds
one more call is checked, to find results that are only sometimes right. Time and memory are reported only for contestants that
passed both checks.

A contestant with several settings competes with the fastest one whose result is right, found before the timed rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from synpo_fast.profiling.peak_memory import peak_extra_memory
from synpo_fast.profiling.rounds import interleave, median_ratio, summarise


class Unavailable(Exception):
    """Raised by a contestant that cannot run a case. The message says why and goes into its row."""


@dataclass(frozen=True)
class Step:
    """The timed work of a contestant: `run()` does it once, `setting` says in words how the contestant is called.

    With `exact=False` it is a floor, which computes nothing to check: its result is ignored. It has no peak memory, since its
    buffers are allocated beforehand.
    """

    run: Callable[[], Any]
    setting: str
    exact: bool = True


# Judges a step's result: returns errors by name, and why the result is wrong or None.
Judge = Callable[[Any], tuple[dict[str, float], str | None]]


@dataclass(frozen=True)
class Options:
    """Settings of a measurement. The rounds end after `budget_seconds`, but not before the third."""

    device: torch.device
    rounds: int
    budget_seconds: float
    cold_l2: bool = False
    seed: int = 0


@dataclass
class Row:
    """A contestant's results in one case. `skipped` is the reason if it has none."""

    name: str
    setting: str = ""
    step: Step | None = None
    error: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)  # settings compared beforehand, with their times
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
    """Returns work(), or None after writing the reason into the row. Catches every exception: peers fail in many ways."""
    try:
        return work()
    except (Unavailable, ImportError) as error:
        row.fail(str(error) if isinstance(error, Unavailable) else describe(error), faulty=False)
    except Exception as error:
        row.fail(describe(error), faulty=True)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # frees what the failed call reserved, for the next contestant
    return None


def judge_row(row: Row, judge: Judge) -> None:
    """Runs the step once. Writes the errors into the row, and the reason if it fails or is wrong."""
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


Timer = Callable[[Callable[[], Any]], float]


def keep_the_fastest(
    row: Row, steps: Sequence[Step], judge: Judge, options: Options, timer: Timer | None = None
) -> None:
    """Gives the row the fastest of several steps whose result is right, or the reason of the first if none is."""
    candidates = [Row(row.name, step.setting, step) for step in steps]
    for candidate in candidates:
        judge_row(candidate, judge)
    calls = {str(i): candidate.step.run for i, candidate in enumerate(candidates) if candidate.step is not None}
    samples = interleave(calls, rounds=3, device=options.device, cold_l2=options.cold_l2, min_rounds=2, timer=timer,
                         budget_seconds=options.budget_seconds / 10)  # fmt: skip
    for i, candidate in enumerate(candidates):
        seconds = min(samples[str(i)]) if str(i) in samples else None
        row.tried.append({"setting": candidate.setting, "seconds": seconds, "skipped": candidate.skipped})
    if samples:
        best = candidates[int(min(samples, key=lambda i: min(samples[i])))]
    else:
        best = candidates[0]
    row.step, row.setting, row.error = best.step, best.setting, best.error
    row.skipped, row.faulty = best.skipped, best.faulty


def prepare_row(
    row: Row, make: Callable[[], Step | Sequence[Step]], judge: Judge, options: Options, timer: Timer | None
) -> None:
    """Makes the row's step and checks its result. Of several steps it takes the fastest right one."""
    made = attempt(row, make)
    if made is None:
        return
    steps = [made] if isinstance(made, Step) else list(made)
    if len(steps) > 1:
        keep_the_fastest(row, steps, judge, options, timer)
    else:
        row.step, row.setting = steps[0], steps[0].setting
        judge_row(row, judge)


def run_contest(
    prepare: Mapping[str, Callable[[], Step | Sequence[Step]]],
    judge: Judge,
    *,
    floor: str,
    options: Options,
    timer: Timer | None = None,
) -> list[dict[str, Any]]:
    """Runs one case and returns its rows for the JSON, in the order of `prepare`, which makes each contestant's step or steps."""
    rows = [Row(name) for name in prepare]
    for row in rows:
        prepare_row(row, prepare[row.name], judge, options, timer)
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
    if row.tried:
        record["tried"] = row.tried
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
