"""A run's numbers at its start and end; those of several runs beside each other, and what differs in their configs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from synpo_fast.report.data import Row, RunRecord, number_in, read_json_object
from synpo_fast.report.formats import NO_NUMBER, large, short, whole
from synpo_fast.report.series import ends, finite, points_of
from synpo_fast.report.tables import table_card
from synpo_fast.report.units import LOGPS, LOSS, REWARD, unit_markup, unit_of, with_units
from synpo_fast.run_folder.best_files import NAME as BEST_MODEL


@dataclass(frozen=True)
class Measure:
    """label: name on the page. Values are shown times factor, followed by unit; `quantity` says what the unit depends on
    where runs may differ in it."""

    label: str
    quantity: str = ""
    factor: float = 1
    unit: str = ""


MEASURES = {
    "rewards/accuracies": Measure("pairs ranked right", factor=100, unit=" %"),
    "rewards/margins": Measure("reward margin", REWARD),
    "rewards/chosen": Measure("reward, chosen", REWARD),
    "rewards/rejected": Measure("reward, rejected", REWARD),
    "loss": Measure("loss", LOSS),
    "logps/chosen": Measure("log-prob, chosen", LOGPS),
    "logps/rejected": Measure("log-prob, rejected", LOGPS),
    "nll_loss": Measure("NLL of chosen, nats a token"),
}


def numbers_markup(run: RunRecord) -> str:
    """Tiles of how the run went, and its start and end, in training and on held-out pairs."""
    tiles = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for name, value in _facts(run))
    rows = []
    for name, measure in MEASURES.items():
        train = points_of(run.steps, name, measure.factor)
        held_out = points_of(run.evaluations, f"eval_{name}", measure.factor)
        if finite(train) or finite(held_out):
            values = [*ends(train)]
            if run.evaluations:
                values += [held_out[0][1] if held_out else None, held_out[-1][1] if held_out else None]
            label = measure.label + unit_markup(unit_of(run, measure.quantity))
            rows.append([label, *(short(value, measure.unit) for value in values)])
    if not rows:
        return f'<div class="tiles">{tiles}</div>'
    when = [f"held out, step {whole(run.evaluations[place]['step'])}" for place in (0, -1)] if run.evaluations else []
    head = ["", "training, start", "training, end", *when]
    return f'<div class="tiles">{tiles}</div>{table_card(head, rows, "numbers stack")}'


def best_lines(run: RunRecord, *, several: bool) -> list[str]:
    """Sentences on the run's best evaluation, and of having stopped early, if evaluations were compared with each other."""
    best = run.part("state").get("best")
    metric = best.get("metric") if isinstance(best, dict) else None
    if not isinstance(best, dict) or not isinstance(metric, str) or not metric:
        return []
    value, before = number_in(best.get("value")), number_in(best.get("before"))
    name = f"{run.name}: " if several else ""
    units = {measure_name: unit_of(run, measure.quantity) for measure_name, measure in MEASURES.items()}
    unit = units.get(metric.removeprefix("eval_"), "")
    if value is None:
        return [f"{name}{metric} was finite in no evaluation."]
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
        ("steps", whole(run.steps[-1]["step"]) if run.steps else NO_NUMBER),
        ("epochs", short(last_number(run.steps, "epoch"), digits=3)),
        ("pairs a second, median", short(statistics.median(speeds) if speeds else None, digits=3)),
        ("tokens a second, median", short(statistics.median(tokens) if tokens else None, digits=3)),
        ("of a step waiting for data, median", short(statistics.median(waits) if waits else None, " %", 2)),
        ("tokens in all", large(last_number(run.steps, "num_tokens"))),
        ("pairs skipped", short(last_number(run.steps, "skipped_pairs"))),
        ("steps not finite", short(max(finite(points_of(run.steps, "nonfinite_steps")), default=None))),
    ]


def compared_markup(runs: Sequence[RunRecord]) -> str:
    rows = []
    for name, measure in MEASURES.items():
        trained = [ends(points_of(run.steps, name, measure.factor))[1] for run in runs]
        held_out = [ends(points_of(run.evaluations[-1:], f"eval_{name}", measure.factor))[1] for run in runs]
        units = [unit_of(run, measure.quantity) for run in runs]
        for kind, values in (("", trained), (", held out", held_out)):
            if any(value is not None for value in values):
                cells = [short(value, measure.unit) for value in values]
                rows.append(with_units(measure.label + kind, cells, units))
    for facts in zip(*map(_facts, runs), strict=True):
        rows.append([facts[0][0], *(value for _, value in facts)])
    head = ["at the end", *(escape(run.name) for run in runs)]
    return table_card(head, rows, "numbers several stack")


def differences_markup(runs: Sequence[RunRecord]) -> str:
    names = list({name: None for run in runs for name in run.config})
    rows = []
    for name in names:
        values = [as_text(run.config[name]) if name in run.config else "not set" for run in runs]
        if len(set(values)) > 1:
            rows.append([escape(name), *map(escape, values)])
    if not rows:
        return '<p class="note">Nothing: the configs are the same.</p>'
    return table_card(["option", *(escape(run.name) for run in runs)], rows, "several")


def as_text(value: Any) -> str:
    """As YAML writes it, so that defaults (tuples) and what was read (lists) look alike."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or value == {}:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def last_number(rows: Sequence[Row], name: str) -> float | None:
    return next((number_in(row[name]) for row in reversed(rows) if name in row), None)
