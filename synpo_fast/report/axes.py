"""The plot area of a chart: maps steps and values to positions, and draws axes with round tick values.

A chart is drawn at about the size at which it is shown (one column on a phone, three on a laptop), so its text keeps its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from synpo_fast.report.formats import whole_number
from synpo_fast.report.series import Point, ticks

WIDTH, HEIGHT, TOP, BOTTOM, RIGHT = 360, 210, 16, 26, 8
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class PlotArea:
    """Maps a step and a value to a position in the picture, and draws the axes around the lines.

    unit follows each value in the pointer's readout. axis is a unit too long for that; both are written at the value axis.
    """

    def __init__(self, first: int, last: int, low: float, high: float, unit: str, axis: str = "") -> None:
        self.only = first if first == last else None  # a single step is drawn in the middle
        self.first, self.last = (first, last) if self.only is None else (first - 1, last + 1)
        self.low, self.high = low, high
        self.y_ticks = ticks(low, high, 4)
        self.labels, self.power = _tick_labels(self.y_ticks)
        self.unit, self.axis = unit.strip(), axis
        self.left = 10 + 6.3 * max(map(len, self.labels), default=1)

    def x(self, step: float) -> float:
        return self.left + (step - self.first) / (self.last - self.first) * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - BOTTOM - TOP)

    def svg(self, body: str, title: str) -> str:
        """The picture: `body` with grid, axes and labels. title: for screen readers."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        grid = "".join(f"M{self.left:.1f} {self.y(tick):.1f}H{right}" for tick in self.y_ticks)
        texts = [
            f'<text x="{self.left - 5:.1f}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{label}</text>'
            for tick, label in zip(self.y_ticks, self.labels, strict=True)
        ]
        note = " ".join(
            part
            for part in (f"×10{str(self.power).translate(RAISED)}" if self.power else "", self.unit, self.axis)
            if part
        )
        texts.append(f'<text x="{self.left:.1f}" y="10">{escape(note)}</text>')
        texts += self._step_labels(right, bottom + 16)
        scale = f'data-x="{self.first} {self.last} {self.left:.1f} {right}" data-y="{self.low!r} {self.high!r} {bottom} {TOP}"'
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}" {scale} '
            f'data-unit="{self.unit}"><path class="grid" d="{grid}"/>'
            f'<path class="axis" d="M{self.left:.1f} {TOP}V{bottom}H{right}"/>{body}{"".join(texts)}'
            f'<path class="rule" d="" /></svg>'
        )

    def _step_labels(self, right: float, y: float) -> list[str]:
        if self.only is not None:
            return [
                f'<text x="{self.x(self.only):.1f}" y="{y}" text-anchor="middle">step {whole_number(self.only)}</text>'
            ]
        end = f"step {whole_number(self.last)}"
        shown = [
            f'<text x="{self.x(tick):.1f}" y="{y}" text-anchor="middle">{tick:,.0f}</text>'
            for tick in ticks(self.first, self.last, 4, whole=True)
            if self.x(tick) + 3.2 * len(f"{tick:,.0f}") < right - 6.4 * len(end) - 4
        ]
        return [*shown, f'<text x="{right}" y="{y}" text-anchor="end">{end}</text>']

    def path(self, points: Sequence[Point]) -> str:
        """The SVG path of a line, interrupted at points without a value."""
        parts: list[str] = []
        run = 0  # points since the last gap; a single one becomes a dot
        for step, value in points:
            if value is None:
                parts += ["h0"] if run == 1 else []
                run = 0
                continue
            parts.append(f"{'L' if run else 'M'}{self.x(step):.1f} {self.y(value):.1f}")
            run += 1
        return "".join(parts) + ("h0" if run == 1 else "")


def _tick_labels(values: Sequence[float]) -> tuple[list[str], int]:
    """Labels without exponents, and the power of ten to multiply them by (0 unless plain numbers would be long)."""
    largest = max((abs(value) for value in values), default=0.0)
    power = math.floor(math.log10(largest)) if largest else 0
    power = power if power >= 6 or power <= -3 else 0
    scaled = [value / 10.0**power for value in values]
    gap = min((abs(after - before) for before, after in itertools.pairwise(scaled)), default=1.0)
    digits = min(9, max(0, -math.floor(math.log10(gap)))) if gap else 0
    if any(abs(round(value, digits) - value) > gap / 100 for value in scaled):
        digits += 1  # ticks 2.5 apart
    return [f"{value + 0.0:,.{digits}f}" for value in scaled], power
