"""Thinning, smoothing, axes and the drawn lines of a report, against numpy and against the numbers that went in."""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from synpo_fast.report.axes import _tick_labels
from synpo_fast.report.charts import CHARTS, LOSS_CHART, OUTCOME, Chart, draw, other_charts
from synpo_fast.report.data import RunRecord, number_in
from synpo_fast.report.formats import short
from synpo_fast.report.series import ends, finite, smoothed, smoothing_window, thinned, ticks, value_range


def record(values, name="loss", evaluations=()):
    rows = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    return RunRecord(".", "run", steps=rows, evaluations=[{"step": s, f"eval_{name}": v} for s, v in evaluations])


def drawn_lines(figure, kind="line"):
    """The (step, value) of each stretch of the lines of a figure, computed back from the picture."""
    first, last, left, right = map(float, re.search(r'data-x="([^"]+)"', figure)[1].split())
    low, high, bottom, top = map(float, re.search(r'data-y="([^"]+)"', figure)[1].split())
    for path in re.findall(rf'<path class="{kind}[^"]*"[^>]* d="([^"]+)"', figure):
        stretches = []
        for letter, x, y in re.findall(r"([ML])(-?[\d.]+) (-?[\d.]+)", path):
            if letter == "M":
                stretches.append([])
            step = first + (float(x) - left) / (right - left) * (last - first)
            stretches[-1].append((step, low + (bottom - float(y)) / (bottom - top) * (high - low)))
        yield stretches


def test_a_drawn_line_gives_its_numbers_back():
    values = [math.sin(step) for step in range(25)]
    (figure,) = [draw(CHARTS[0], [record(values)], ["red"])]
    ((line,),) = drawn_lines(figure)
    assert [step for step, _ in line] == pytest.approx(range(1, 26), abs=0.01)
    assert [value for _, value in line] == pytest.approx(values, abs=0.001 * 2.2)


@pytest.mark.parametrize("lost", [None, float("nan"), float("inf"), -float("inf"), 10**400, "low", True, [1]])
def test_what_is_no_number_leaves_a_gap(lost):
    values = [1.0, 2.0, lost, 4.0, lost, 5.0, 6.0]
    figure = draw(CHARTS[0], [record(values)], ["red"])
    (stretches,) = drawn_lines(figure)
    assert [len(stretch) for stretch in stretches] == [2, 1, 2]
    assert "h0" in figure  # the lone point is a dot
    marks = re.search(r'class="lost"[^>]* d="([^"]+)"', figure)[1]
    assert marks.count("M") == 2


def test_a_long_gap_of_a_long_run_stays_a_gap():
    values = [None if 4000 <= step < 5000 else 1.0 + step % 2 for step in range(10_000)]
    figure = draw(CHARTS[0], [record(values)], ["red"])
    for kind in ("line", "raw"):
        (stretches,) = drawn_lines(figure, kind)
        assert len(stretches) == 2
        assert 3950 < stretches[0][-1][0] <= 4001 and 5000 <= stretches[1][0][0] < 5050


def test_thinning_keeps_spikes_and_order():
    generator = np.random.default_rng(1)
    values = generator.normal(size=10_007)
    values[[123, 9_876]] = 50, -60
    points = list(enumerate(values.tolist()))
    kept = thinned(points, 200)
    assert len(kept) <= 400 and kept == sorted(kept) and set(kept) <= set(points)
    assert {(123, 50.0), (9_876, -60.0)} <= set(kept)
    assert thinned(points[:400], 200) == points[:400]


@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("count", [61, 1000, 4321])  # fewer points than bins; some; odd
def test_the_trend_is_a_centred_window(count, median):
    values = np.random.default_rng(2).normal(size=count)
    trend = smoothed(list(enumerate(values.tolist())), 150, median=median)
    half = smoothing_window(count) // 2
    for step, value in trend:
        window = values[max(0, step - half) : step + half + 1]
        assert value == pytest.approx(np.median(window) if median else window.mean())
    assert min(count, 140) <= len(trend) <= 150


def test_ends_are_means_of_a_twentieth():
    points = [(step, float(step)) for step in range(100)]
    assert ends(points) == (2.0, 97.0) and ends(points, exact=True) == (0.0, 99.0)
    assert ends([(1, None)]) == (None, None) and ends([]) == (None, None)


def test_far_outliers_do_not_flatten_the_rest():
    values = [1 + 0.1 * math.sin(step) for step in range(1000)]
    values[500] = 1e6
    low, high, cut = value_range(values, 0.0)
    assert cut and low == 0.0 and high < 2
    figure = draw(CHARTS[0], [record(values)], ["red"])
    assert "axis cut: values range from 0.9 to 1e6" in figure
    assert value_range(values[:400])[2] is False


numbers = st.floats(-1e99, 1e99)


@given(st.lists(numbers, min_size=1, max_size=20))
def test_axes_hold_every_value_and_have_round_ticks(values):
    low, high, _ = value_range(values)
    assert low <= min(values) and max(values) <= high and low < high
    found = ticks(low, high, 4)
    labels, power = _tick_labels(found)
    assert len(found) <= 11 and len(labels) == len(found)
    assume(high - low > 1e-9 * max(abs(low), abs(high)))  # else neighbours in floating point
    assert len(found) >= 2 and len(set(labels)) == len(labels)
    gaps = np.diff(found)
    assert np.allclose(gaps, gaps[0], rtol=1e-4)
    read = [float(label.replace(",", "")) * 10.0**power for label in labels]
    assert np.allclose(read, found, rtol=0, atol=gaps[0] / 50)


@given(st.lists(st.none() | st.floats() | st.integers(), min_size=1, max_size=30), st.booleans())
def test_any_series_can_be_drawn(values, several):
    runs = [record(values, evaluations=[(3, values[0])])] * (2 if several else 1)
    figure = draw(Chart("Loss", {"loss": "loss"}, floor=0, ceiling=1), runs, ["red"] * len(runs))
    assert bool(figure) == bool([value for value in values if number_in(value) is not None])
    assert "nan" not in figure and "inf" not in figure.replace("info", "")


def test_counters_are_drawn_only_when_they_count():
    chart = next(chart for chart in CHARTS if chart.counter)
    (name,) = chart.metrics
    assert draw(chart, [record([0, 0, 0], name)], ["red"]) == ""
    assert draw(chart, [record([0, 1, 1], name)], ["red"])


def test_unknown_numbers_get_a_chart_of_their_own():
    run = record([1.0, 2.0], "mine/own")
    run.steps[0] |= {"loss": 1.0, "epoch": 0.5, "note": "text"}
    assert [chart.title for chart in other_charts([run])] == ["mine/own"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.0, "3"),
        (0.123456, "0.1235"),
        (-5e-6, "-5e-6"),
        (1234.5, "1,234"),
        (31e7, "3.1e8"),
        (0.00123456, "0.001235"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_finite_leaves_out_the_rest():
    assert finite([(1, None), (2, 0.0), (3, 4.0)]) == [0.0, 4.0]


def test_one_slow_first_step_does_not_flatten_the_waiting():
    chart = next(chart for chart in OUTCOME + CHARTS if "data_wait_share" in chart.metrics)
    for count in (8, 12, 70, 150):
        values = [0.99] + [0.002 + 0.001 * (step % 2) for step in range(count - 1)]
        figure = draw(chart, [record(values, "data_wait_share")], ["red"])
        low, high = map(float, re.search(r'data-y="(\S+) (\S+)', figure).groups())
        assert low == 0 and 0.3 <= high < 1, (count, high)
        assert "axis cut: values range from 0.2 % to 99 %" in figure
    steady = draw(chart, [record([0.3, 0.2, 0.4, 0.3] * 5, "data_wait_share")], ["red"])
    assert "axis cut" not in steady and float(re.search(r'data-y="(\S+) (\S+)', steady)[2]) == pytest.approx(41.2)
    still = draw(chart, [record([0.5] + [0.0] * 20, "data_wait_share")], ["red"])
    assert float(re.search(r'data-y="(\S+) (\S+)', still)[2]) <= 1


def test_a_single_step_is_seen_in_the_middle():
    figure = draw(LOSS_CHART, [record([0.7])], ["red"])
    first, last, left, right = map(float, re.search(r'data-x="([^"]+)"', figure)[1].split())
    ((x, y),) = re.findall(r'<circle class="dot"[^>]* cx="([\d.]+)" cy="([\d.]+)"', figure)
    assert float(x) == pytest.approx((left + right) / 2, abs=0.1) and 20 < float(y) < 190
    assert (first, last) == (0, 2) and ">step 1<" in figure and "step 2" not in figure
