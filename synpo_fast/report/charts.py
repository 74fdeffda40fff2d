"""The charts of a report, as SVG written without a plotting library, so that they follow the page's light and dark colours.

OUTCOME and CHARTS list the charts. A logged number that is in neither gets a chart of its own at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from synpo_fast.losses.weighted_sum import LOSS_METRIC
from synpo_fast.report.axes import TOP, PlotArea
from synpo_fast.report.colours import RESPONSE_COLOURS
from synpo_fast.report.data import RunRecord
from synpo_fast.report.formats import short
from synpo_fast.report.series import (
    SMOOTH_FROM,
    Point,
    ends,
    finite,
    points_of,
    smoothed,
    thinned,
    value_range,
)
from synpo_fast.report.units import GRADIENT, LOGPS, LOSS, MEMBER, REWARD, REWARD_GRADIENT, accuracy_label, by_unit

POINT_BUDGET = 900  # about so many points in a chart, shared by its lines
MAX_MARKS = 40


@dataclass(frozen=True)
class Chart:
    """A chart of one or two metrics over the steps.

    metrics: name in metrics.jsonl -> label. floor, ceiling: bounds of the value axis, if values do not lie beyond.
    factor, unit: values are shown as value * factor, followed by unit.
    """

    title: str
    metrics: dict[str, str]
    floor: float | None = None
    ceiling: float | None = None
    factor: float = 1.0
    unit: str = ""
    axis: str = ""  # a unit too long to follow a value; written at the axis
    median: bool = False  # outliers are usual: the trend is a moving median, and the axis leaves them out
    exact: bool = False  # without noise, so it is not smoothed
    counter: bool = False  # counts up over the run; not drawn if always 0; evaluations have counts of their own
    quantity: str = ""  # what its unit depends on (report/units.py); runs with different units get separate charts


OUTCOME = (  # the result of preference training; the page begins with it
    Chart("Pairs ranked correctly", {"rewards/accuracies": "accuracy"}, floor=0, ceiling=100, factor=100, unit=" %"),
    Chart("Reward margin: chosen minus rejected", {"rewards/margins": "margin"}, quantity=REWARD),
    Chart("Reward of each response", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, quantity=REWARD),
)
LOSS_CHART = Chart("Loss", {"loss": "loss"}, quantity=LOSS)
NLL_CHART = Chart("NLL of the chosen response", {"nll_loss": "NLL"}, axis="nats per token")
CHARTS = (
    LOSS_CHART,
    Chart("Log-prob of each response", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, quantity=LOGPS),
    Chart(
        "Mean log-prob of a token",
        {"diagnostics/logps_mean/chosen": "chosen", "diagnostics/logps_mean/rejected": "rejected"},
        axis="nats per token",
    ),
    NLL_CHART,
    Chart(
        "Chosen tokens that are the model's first choice",
        {"mean_token_accuracy": "share"},
        floor=0,
        factor=100,
        unit=" %",
    ),
    Chart("Entropy of the model's next token", {"entropy": "entropy"}, floor=0, axis="nats"),
    Chart("Reference point of kto", {"kl": "kl"}, floor=0, axis="nats per response"),
    Chart("Gradient norm, before clipping", {"grad_norm": "norm"}, floor=0, median=True, quantity=GRADIENT),
    Chart(
        "Gradient norm of each response's reward",
        {"diagnostics/grad_norm_chosen": "chosen", "diagnostics/grad_norm_rejected": "rejected"},
        floor=0,
        quantity=REWARD_GRADIENT,
    ),
    Chart("Learning rate", {"learning_rate": "rate"}, floor=0, exact=True),
    Chart("Throughput: pairs per second", {"pairs_per_s": "pairs/s"}, floor=0, median=True),
    Chart("Throughput: tokens per second", {"tokens_per_s": "tokens/s"}, floor=0, median=True),
    Chart(
        "Share of a step spent waiting for data",
        {"data_wait_share": "wait"},
        floor=0,
        factor=100,
        unit=" %",
        median=True,
    ),
    Chart("Skipped pairs so far", {"skipped_pairs": "skipped"}, floor=0, exact=True, counter=True),
    Chart(
        "Steps so far with a non-finite loss or gradient",
        {"nonfinite_steps": "steps"},
        floor=0,
        exact=True,
        counter=True,
    ),
    Chart(
        "Feature cache lookups so far",
        {"feature_cache/hits": "found", "feature_cache/misses": "not found"},
        floor=0,
        exact=True,
    ),
    Chart("Peak GPU memory, GiB", {"peak_memory_gib": "GiB"}, floor=0, exact=True),
    Chart("Loss scale", {"loss_scale": "scale"}, floor=0, exact=True),
)
UNCHARTED = {"step", "epoch", "num_tokens"}  # they grow with the step, so a chart shows nothing new
COMPARISONS = tuple(name for chart in OUTCOME for name in chart.metrics)
PAIR_COLOURS = tuple(RESPONSE_COLOURS.values())


@dataclass(frozen=True)
class Line:
    """A line of a chart. points: training steps. marks: evaluations."""

    label: str
    colour: str
    points: list[Point]
    marks: list[Point]
    dashed: bool = False


def other_charts(runs: Sequence[RunRecord]) -> list[Chart]:
    """Charts of the logged numbers that are in neither OUTCOME nor CHARTS."""
    known = {name for chart in (*OUTCOME, *CHARTS) for name in chart.metrics} | UNCHARTED
    names = {name: None for run in runs for row in run.steps for name in row if name not in known}
    shown = [name for name in names if any(finite(points_of(run.steps, name)) for run in runs)]
    return [Chart(name, {name: name}, quantity=MEMBER if name.startswith(LOSS_METRIC) else "") for name in shown]


def outcome_charts(runs: Sequence[RunRecord]) -> tuple[Chart, ...]:
    """The charts of accuracy and rewards, or the NLL if no run compared pairs: it is the loss of supervised runs."""
    compared = any(finite(points_of(run.steps + run.evaluations, name)) for run in runs for name in COMPARISONS)
    label = accuracy_label(runs)
    named = replace(OUTCOME[0], title=label[0].upper() + label[1:])
    return (named, *OUTCOME[1:]) if compared else (NLL_CHART,)


def figures(chart: Chart, runs: Sequence[RunRecord], colours: Sequence[str]) -> list[str]:
    """The chart, once for each unit that the runs' numbers have; an empty list if no run has such a number."""
    groups = by_unit(runs, colours, chart.quantity)
    drawn = []
    for unit, members, hues in groups:
        own = replace(chart, axis=unit) if unit else chart
        names = ", ".join(run.name for run in members) if len(groups) > 1 else ""
        drawn.append(draw(own, members, hues, names=names, several=len(runs) > 1))
    return [figure for figure in drawn if figure]


def draw(
    chart: Chart, runs: Sequence[RunRecord], colours: Sequence[str], *, names: str = "", several: bool | None = None
) -> str:
    """The figure, or "" if no run has such a number.

    names: the runs in this figure, if it does not show all runs of the page. several: True if the page has several runs.
    """
    several = len(runs) > 1 if several is None else several
    lines = _lines(chart, runs, colours, several=several)
    values = [value for line in lines for value in finite(line.points) + finite(line.marks)]
    if not values or (chart.counter and not any(values)):
        return ""
    low, high, cut = value_range(values, chart.floor, chart.ceiling, spiky=chart.median)
    steps = [step for line in lines for step, _ in line.points + line.marks]
    area = PlotArea(min(steps), max(steps), low, high, chart.unit, chart.axis)
    bins = max(40, POINT_BUDGET // (2 * len(lines)))
    body = "".join(_drawn(line, chart, area, bins) for line in lines)
    notes = [names] if names else []
    notes += [] if several else [_start_to_end(chart, lines)]
    if cut:
        notes.append(
            f"axis cut: values range from {short(min(values), chart.unit)} to {short(max(values), chart.unit)}"
        )
    legend = "" if len(chart.metrics) == 1 else _legend(chart, lines, several)
    title = f"{chart.title} ({chart.axis})" if names else chart.title
    return (
        f'<figure class="chart"><figcaption><h3>{escape(chart.title)}</h3>{legend}'
        f'<p class="note">{escape(" · ".join(notes))}</p></figcaption>'
        f'<div class="plot">{area.svg(body, title)}<div class="readout" hidden></div></div></figure>'
    )


def _lines(chart: Chart, runs: Sequence[RunRecord], colours: Sequence[str], *, several: bool) -> list[Line]:
    """The lines of a chart. One run: a colour for each metric. Several: a colour for each run, and the second metric dashed."""
    lines = []
    for run, colour in zip(runs, colours, strict=True):
        for number, (name, label) in enumerate(chart.metrics.items()):
            points = points_of(run.steps, name, chart.factor)
            marks = [] if chart.counter else points_of(run.evaluations, f"eval_{name}", chart.factor)
            if not finite(points) and not finite(marks):
                continue
            hue = colour if several or len(chart.metrics) == 1 else PAIR_COLOURS[number]
            full = f"{run.name} {label}" if several else label
            lines.append(Line(full, hue, points, _thinned_marks(marks), dashed=several and number > 0))
    return lines


def _drawn(line: Line, chart: Chart, area: PlotArea, bins: int) -> str:
    name, style = escape(line.label, quote=True), f'style="--c:{line.colour}"'
    dash = " dashed" if line.dashed else ""
    parts = []
    if len(line.points) >= SMOOTH_FROM and not chart.exact:
        parts.append(f'<path class="raw" {style} d="{area.path(thinned(line.points, bins))}"/>')
        trend = area.path(smoothed(line.points, bins, median=chart.median))
        parts.append(f'<path class="line{dash}" {style} data-name="{name}" d="{trend}"/>')
    elif line.points:
        path = area.path(thinned(line.points, bins))
        parts.append(f'<path class="line{dash}" {style} data-name="{name}" d="{path}"/>')
    alone = [(step, value) for step, value in line.points if value is not None]
    if len(alone) == 1:  # a line of one point is invisible
        ((only, height),) = alone
        parts.append(f'<circle class="dot" {style} cx="{area.x(only):.1f}" cy="{area.y(height):.1f}" r="3.2"/>')
    lost = sorted({round(area.x(step)) for step, value in line.points if value is None})
    if lost:
        marks = "".join(f"M{x} {TOP}v5" for x in lost)
        parts.append(f'<path class="lost" d="{marks}"><title>not finite</title></path>')
    for step, value in line.marks:
        if value is not None:
            parts.append(f'<circle class="mark" {style} cx="{area.x(step):.1f}" cy="{area.y(value):.1f}" r="3"/>')
    return "".join(parts)


def _thinned_marks(marks: list[Point]) -> list[Point]:
    if len(marks) <= MAX_MARKS:
        return marks
    return [marks[round(place * (len(marks) - 1) / (MAX_MARKS - 1))] for place in range(MAX_MARKS)]


def _start_to_end(chart: Chart, lines: Sequence[Line]) -> str:
    """Text such as "chosen 0.3 → 0.31": each line's value at the start and the end of one run."""
    parts = []
    for line in lines:
        start, end = ends(line.points or line.marks, exact=chart.exact)
        label = f"{line.label} " if len(chart.metrics) > 1 else ""
        top = max(finite(line.points), default=0.0)
        peak = chart.exact and top > max(start or 0.0, end or 0.0)
        highest = f", highest {short(top, chart.unit, 3)}" if peak else ""
        parts.append(f"{label}{short(start, chart.unit, 3)} → {short(end, chart.unit, 3)}{highest}")
    return " · ".join(parts)


def _legend(chart: Chart, lines: Sequence[Line], several: bool) -> str:
    items = []
    for number, label in enumerate(chart.metrics.values()):
        colour = "currentColor" if several else PAIR_COLOURS[number]
        style = "dashed" if several and number else "solid"
        items.append(f'<span><i style="border-top:2px {style} {colour}"></i>{escape(label)}</span>')
    return f'<p class="key">{"".join(items)}</p>' if lines else ""
