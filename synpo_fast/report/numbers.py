"""Tables of a run's numbers at its start and end, of several runs' final numbers, and of differences between their configs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from synpo_fast.report.data import Row, RunRecord, number_in, read_json_object
from synpo_fast.report.formats import NO_NUMBER, large, short, whole_number
from synpo_fast.report.series import ends, finite, points_of
from synpo_fast.report.tables import table_card
from synpo_fast.report.units import LOGPS, LOSS, REWARD, accuracy_label, unit_markup, unit_of, with_units
from synpo_fast.run_folder.best_files import NAME as BEST_MODEL


@dataclass(frozen=True)
class Measure:
    """A metric in the tables. label: its name on the page. Values are shown times factor, followed by unit.

    quantity: what the unit depends on, if runs can have different units (report/units.py).
    """

    label: str
    quantity: str = ""
    factor: float = 1
    unit: str = ""


MEASURES = {
    "rewards/accuracies": Measure("pairs ranked correctly", factor=100, unit=" %"),
    "rewards/margins": Measure("reward margin", REWARD),
    "rewards/chosen": Measure("reward, chosen", REWARD),
    "rewards/rejected": Measure("reward, rejected", REWARD),
    "loss": Measure("loss", LOSS),
    "logps/chosen": Measure("log-prob, chosen", LOGPS),
    "logps/rejected": Measure("log-prob, rejected", LOGPS),
    "nll_loss": Measure("NLL of chosen, nats per token"),
}


def numbers_markup(run: RunRecord) -> str:
    """Tiles of the run's totals and speeds, and a table of its first and last numbers in training and on held-out pairs."""
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in _facts(run))
    rows = []
    for name, measure in MEASURES.items():
        train = points_of(run.steps, name, measure.factor)
        held_out = points_of(run.evaluations, f"eval_{name}", measure.factor)
        if finite(train) or finite(held_out):
            values = [*ends(train)]
            if run.evaluations:
                values += [held_out[0][1] if held_out else None, held_out[-1][1] if held_out else None]
            label = _label(name, [run]) + unit_markup(unit_of(run, measure.quantity))
            rows.append([label, *(short(value, measure.unit) for value in values)])
    if not rows:
        return f'<div class="tiles">{tiles}</div>'
    when = (
        [f"held out, step {whole_number(run.evaluations[place]['step'])}" for place in (0, -1)]
        if run.evaluations
        else []
    )
    head = ["", "training, start", "training, end", *when]
    return f'<div class="tiles">{tiles}</div>{table_card(head, rows, "numbers stack")}'


def _label(name: str, runs: Sequence[RunRecord]) -> str:
    return accuracy_label(runs) if name == "rewards/accuracies" else MEASURES[name].label


def best_lines(run: RunRecord, *, several: bool) -> list[str]:
    """Sentences about the run's best evaluation and about early stopping; none if the run did not compare its evaluations."""
    best = run.part("state").get("best")
    metric = best.get("metric") if isinstance(best, dict) else None
    if not isinstance(best, dict) or not isinstance(metric, str) or not metric:
        return []
    value, before = number_in(best.get("value")), number_in(best.get("before"))
    name = f"{run.name}: " if several else ""
    units = {measure_name: unit_of(run, measure.quantity) for measure_name, measure in MEASURES.items()}
    unit = units.get(metric.removeprefix("eval_"), "")
    if value is None:
        return [f"{name}{metric} was not finite in any evaluation."]
    text = f"Best evaluation: {metric} {short(value)}{f' ({unit})' if unit else ''} at step {short(number_in(best.get('step')))}"
    text += f", before training {short(before)}" if before is not None else ""
    kept = run.config.get("load_best_model_at_end") is True
    lines = [f"{name}{text}.{' Its model is in the output folder.' if kept and _holds_best(run, best) else ''}"]
    patience, waited = number_in(run.config.get("early_stopping_patience")), number_in(best.get("without_improvement"))
    if patience is not None and waited is not None and waited >= patience:
        lines.append(f"{name}Early stopping ended the run: {short(waited)} evaluations in a row were no better.")
    return lines


def _holds_best(run: RunRecord, best: dict[str, Any]) -> bool:
    found = read_json_object(run.folder / BEST_MODEL, run.problems)
    return found is not None and found.get("step") == best.get("step")


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    waits = finite(points_of(run.steps, "data_wait_share", 100))
    speeds = finite(points_of(run.steps, "pairs_per_s"))
    tokens = finite(points_of(run.steps, "tokens_per_s"))
    return [
        ("steps", whole_number(run.steps[-1]["step"]) if run.steps else NO_NUMBER),
        ("epochs", short(last_number(run.steps, "epoch"), digits=3)),
        ("pairs per second, median", short(statistics.median(speeds) if speeds else None, digits=3)),
        ("tokens per second, median", short(statistics.median(tokens) if tokens else None, digits=3)),
        ("of step time waiting for data, median", short(statistics.median(waits) if waits else None, " %", 2)),
        ("tokens in total", large(last_number(run.steps, "num_tokens"))),
        ("pairs skipped", short(last_number(run.steps, "skipped_pairs"))),
        ("non-finite steps", short(max(finite(points_of(run.steps, "nonfinite_steps")), default=None))),
    ]


def compared_markup(runs: Sequence[RunRecord]) -> str:
    """A table of the final numbers of several runs, one column per run."""
    rows = []
    for name, measure in MEASURES.items():
        trained = [ends(points_of(run.steps, name, measure.factor))[1] for run in runs]
        held_out = [ends(points_of(run.evaluations[-1:], f"eval_{name}", measure.factor))[1] for run in runs]
        units = [unit_of(run, measure.quantity) for run in runs]
        for kind, values in (("", trained), (", held out", held_out)):
            if any(value is not None for value in values):
                cells = [short(value, measure.unit) for value in values]
                rows.append(with_units(_label(name, runs) + kind, cells, units))
    for facts in zip(*map(_facts, runs), strict=True):
        rows.append([facts[0][0], *(value for _, value in facts)])
    head = ["at the end", *(escape(run.name) for run in runs)]
    return table_card(head, rows, "numbers several stack")


def differences_markup(runs: Sequence[RunRecord]) -> str:
    """A table of the options whose values differ between the runs. A run without a config is left out, and a note says so."""
    unknown = [escape(run.name) for run in runs if not run.config]
    note = f'<p class="note">Left out, because no options are known: {", ".join(unknown)}.</p>' if unknown else ""
    runs = [run for run in runs if run.config]
    if len(runs) < 2:
        return f'<p class="note">Nothing to compare.</p>{note}'
    names = list({name: None for run in runs for name in run.config})
    rows = []
    for name in names:
        values = [as_text(run.config[name]) if name in run.config else "not set" for run in runs]
        if len(set(values)) > 1:
            rows.append([escape(name), *map(escape, values)])
    if not rows:
        return f'<p class="note">None: the configs are identical.</p>{note}'
    return table_card(["option", *(escape(run.name) for run in runs)], rows, "several") + note


def as_text(value: Any) -> str:
    """An option's value as text, so that a default (a tuple) and a value read from YAML (a list) look alike."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def last_number(rows: Sequence[Row], name: str) -> float | None:
    return next((number_in(row[name]) for row in reversed(rows) if name in row), None)
