"""A metric over steps, made small enough for a page: gaps kept, spikes kept, a moving mean over them.

A run of 10,000 steps has more points than a chart has pixels. Steps are put into bins; of each bin the lowest and the highest
value stay, so that a spike is seen, and a mean over a centred window of steps gives the trend. Where a number was not finite
there is no point, and the line is broken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from synpo_fast.report.data import number_in

Point = tuple[int, float | None]
SMOOTH_FROM = 60  # shorter series are shown as they are
ENDS = 20  # the first and last 1/20 of the steps stand for a run's start and end
CUT_FROM = 200  # with fewer points no value counts as an outlier
CUT_SHARE = 0.01
SPIKY_FROM = 8
TINY = 1e-100


def points_of(rows: Sequence[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[Point]:
    """(step, value) of the rows that have the metric; None where it is not a finite number."""
    found: list[Point] = []
    for row in rows:
        if name in row:
            value = number_in(row[name])
            found.append((row["step"], None if value is None else value * factor))
    return found


def finite(points: Sequence[Point]) -> list[float]:
    return [value for _, value in points if value is not None]


def smoothing_window(count: int) -> int:
    return max(5, count // 25)


def thinned(points: Sequence[Point], bins: int) -> list[Point]:
    """At most two points a bin, its extremes in their order; a bin without a finite value gives a gap."""
    if len(points) <= 2 * bins:
        return list(points)
    kept: list[Point] = []
    for part in _parts(points, bins):
        good = [point for point in part if point[1] is not None]
        if not good:
            kept.append(part[len(part) // 2])
            continue
        low, high = min(good, key=_value), max(good, key=_value)
        kept += sorted({low, high})
    return kept


def smoothed(points: Sequence[Point], bins: int, *, median: bool = False) -> list[Point]:
    """The moving mean, or median, at the middle of each bin, over the finite values around it.

    A median where single values lie far off (gradient norms, speeds); a mean where values are few (0 or 1 for one pair).
    """
    half = smoothing_window(len(points)) // 2
    middle_of = statistics.median if median else statistics.fmean
    trend: list[Point] = []
    begin = 0
    for part in _parts(points, min(bins, len(points))):
        middle = begin + len(part) // 2
        first, last = max(0, middle - half), min(len(points), middle + half + 1)
        empty = all(value is None for _, value in part)
        trend.append((points[middle][0], None if empty else middle_of(finite(points[first:last]))))
        begin += len(part)
    return trend


def ends(points: Sequence[Point], *, exact: bool = False) -> tuple[float | None, float | None]:
    """The mean of the first and of the last twentieth of the points (at least one each); exact: of one each."""
    size = 1 if exact else max(1, len(points) // ENDS)
    return _mean(finite(points[:size])), _mean(finite(points[-size:]))


def value_range(
    values: Sequence[float], floor: float | None = None, ceiling: float | None = None, *, spiky: bool = False
) -> tuple[float, float, bool]:
    """(lowest, highest, whether values lie beyond) of an axis. A few far outliers must not flatten all the rest.

    spiky: single values far off are usual (the first step waits for the first video), so few points suffice to tell them.
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
    """Round numbers in [low, high], about so many; whole: integers."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        step = max(1, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _parts(points: Sequence[Point], bins: int) -> list[list[Point]]:
    """Points by equal stretches of steps; empty stretches are left out."""
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
