"""Reduces a metric's values over the steps to what a chart can show: gaps and spikes are kept, and a moving mean is added.

A run of 10,000 steps has more points than a chart has pixels. Steps are put into bins. The lowest and the highest value of each
bin are kept, so spikes stay visible; the trend is a mean over a centred window of steps. A value that is not finite leaves a
gap in the line.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from synpo_fast.report.data import number_in

Point = tuple[int, float | None]
SMOOTH_FROM = 60  # shorter series are drawn without smoothing
ENDS = 20  # a run's start and end are means over the first and the last 1/20 of its steps
CUT_FROM = 200  # with fewer points no value counts as an outlier
CUT_SHARE = 0.01  # share of the values, at each end, that may lie outside the axis
SPIKY_FROM = 8  # CUT_FROM for metrics in which outliers are usual
TINY = 1e-100


def points_of(rows: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    """(step, value) of the rows that have the metric; the value is None if it is not a finite number."""
    found: list[Point] = []
    for row in rows:
        if name in row:
            value = number_in(row[name])
            found.append((row["step"], None if value is None else value * factor))
    return found


def finite(points: Sequence[Point]) -> list[float]:
    """The values of the points that have one."""
    return [value for _, value in points if value is not None]


def smoothing_window(count: int) -> int:
    """The number of steps that the trend of `count` points averages over."""
    return max(5, count // 25)


def thinned(points: Sequence[Point], bins: int) -> list[Point]:
    """At most two points per bin: its lowest and its highest, in step order. A bin without a finite value gives a gap."""
    if len(points) <= 2 * bins:
        return list(points)
    kept: list[Point] = []
    for part in _binned(points, bins):
        good = [point for point in part if point[1] is not None]
        if not good:
            kept.append(part[len(part) // 2])
            continue
        low, high = min(good, key=_value), max(good, key=_value)
        kept += sorted({low, high})
    return kept


def smoothed(points: Sequence[Point], bins: int, *, median: bool = False) -> list[Point]:
    """The moving mean, or median, at the middle of each bin, over the finite values in the window around it.

    The median suits metrics with outliers (gradient norms, speeds); the mean suits few distinct values (0 or 1 for one pair).
    """
    half = smoothing_window(len(points)) // 2
    middle_of = statistics.median if median else statistics.fmean
    trend: list[Point] = []
    begin = 0
    for part in _binned(points, min(bins, len(points))):
        middle = begin + len(part) // 2
        first, last = max(0, middle - half), min(len(points), middle + half + 1)
        empty = all(value is None for _, value in part)
        trend.append((points[middle][0], None if empty else middle_of(finite(points[first:last]))))
        begin += len(part)
    return trend


def ends(points: Sequence[Point], *, exact: bool = False) -> tuple[float | None, float | None]:
    """The means of the first and of the last 1/20 of the points (at least one each). exact: the first and the last value."""
    size = 1 if exact else max(1, len(points) // ENDS)
    return _mean(finite(points[:size])), _mean(finite(points[-size:]))


def value_range(
    values: Sequence[float], floor: float | None = None, ceiling: float | None = None, *, spiky: bool = False
) -> tuple[float, float, bool]:
    """(lowest, highest, True if values lie beyond) of an axis. It leaves out a few far outliers, which would flatten the line.

    spiky: outliers are usual in this metric (the first step waits for the first video), so few points suffice to detect them.
    """
    ordered = sorted(values)
    low, high, cut = ordered[0], ordered[-1], False
    if high - low < TINY:
        high = low
    if len(ordered) >= (SPIKY_FROM if spiky else CUT_FROM):
        skip = max(1 + (len(ordered) >= 2 * SPIKY_FROM), int(len(ordered) * CUT_SHARE))
        inner_low, inner_high = ordered[skip], ordered[-1 - skip]
        spread = inner_high - inner_low
        if (spread > 0 or spiky) and high - low > 4 * spread:
            bounds = max(low, inner_low - spread / 2), min(high, inner_high + spread / 2)
            cut, (low, high) = True, bounds
    pad = (high - low) * 0.06 or (abs(high) * 0.06 if abs(high) > TINY else 1.0)
    low, high = low - pad, high + pad
    if floor is not None and low + pad >= floor:
        low = floor
    if ceiling is not None and high - pad <= ceiling:
        high = ceiling
    return low, high, cut


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers in [low, high], about `about` of them. whole: integers only."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _binned(points: Sequence[Point], bins: int) -> list[list[Point]]:
    """The points grouped into bins of equally many steps, without empty bins."""
    first, last = points[0][0], points[-1][0]
    width = max(1, last - first)
    parts: list[list[Point]] = []
    number = -1
    for point in points:
        place = min(bins - 1, (point[0] - first) * bins // width)
        if place != number:
            parts.append([])
            number = place
        parts[-1].append(point)
    return parts


def _value(point: Point) -> float:
    assert point[1] is not None
    return point[1]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
