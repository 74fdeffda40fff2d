"""Assembles the HTML page: the runs' numbers, captions, charts, skipped pairs, configs and versions.

Every text that comes from a file goes through `escape`. A Content-Security-Policy in the page's head allows only embedded
pictures, embedded styles and our one script, by its hash. So no caption can make the page load or run anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.report.captions import captions_markup, text_markup
from synpo_fast.report.charts import CHARTS, UNCHARTED, figures, other_charts, outcome_charts
from synpo_fast.report.colours import series_colour
from synpo_fast.report.data import RunRecord
from synpo_fast.report.formats import NO_NUMBER, whole_number
from synpo_fast.report.numbers import (
    as_text,
    best_lines,
    compared_markup,
    differences_markup,
    last_number,
    numbers_markup,
)
from synpo_fast.report.profile import demo_markup, profile_markup
from synpo_fast.report.series import SMOOTH_FROM, finite, points_of, smoothing_window
from synpo_fast.report.style import SCRIPT, STYLE
from synpo_fast.report.tables import table, table_card

MAX_SKIPPED, MAX_OPEN = 50, 8


def page(runs: Sequence[RunRecord], demo: tuple[dict[str, Any], Path] | None, problems: Sequence[str]) -> str:
    """The page as HTML. demo: the content of demo.json and its folder. problems: those that belong to no single run."""
    colours = [series_colour(number) for number in range(len(runs))]
    several = len(runs) > 1
    trained = any(run.trained for run in runs)
    sections = [("Outcome", _outcome(runs, colours))] if trained else []
    if demo is not None:
        sections.append(("Demo", demo_markup(*demo)))
    if trained:
        sections.append(("Numbers", compared_markup(runs) if several else numbers_markup(runs[0])))
    if several:
        sections.append(("Config differences", differences_markup(runs)))
    if trained:
        sections.append(("Charts", _charts(runs, colours)))
        sections.append(("Captions of held-out videos", captions_markup(runs, colours)))
    for run in runs:
        if run.profile is not None:
            sections.append((f"Profile of {run.name}" if several else "Profile", profile_markup(run.profile)))
    if trained:
        sections.append(("Skipped pairs", _skipped(runs)))
    sections.append(("Config", _configs(runs)))
    if trained:  # a profile lists versions in its own section
        sections.append(("Versions", _versions(runs)))
    links = "".join(f'<a href="#s{number}">{escape(name)}</a>' for number, (name, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{number}"><h2>{escape(name)}</h2>{content}</section>'
        for number, (name, content) in enumerate(sections)
    )
    legend = _run_legend(runs, colours) if trained else ""
    title = " vs ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} – synpo_fast</title><style>{STYLE}</style></head>"
        f"<body><header><h1>{escape(title)}</h1><p class='soft'>{escape(_subtitle(runs))}</p>"
        f"{_problems(runs, problems)}<nav>{links}</nav></header><main>{legend}{body}</main>"
        f"<footer>Written by synpo_fast. This page loads nothing from the network.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _subtitle(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        return "Several runs compared. Each run has its own colour."
    config = runs[0].config
    facts = [config.get("loss_type"), config.get("model_name_or_path"), config.get("train_file")]
    return " · ".join(str(fact) for fact in facts if fact)


def _problems(runs: Sequence[RunRecord], more: Sequence[str]) -> str:
    """A box of problems that affect how far the rest of the page can be trusted."""
    found = list(more)
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        lost = max(finite(points_of(run.steps, "nonfinite_steps")), default=0.0)
        notes = [f"the loss or gradient was not finite in {lost:.0f} steps"] if lost else []
        if run.part("state").get("stopped_early") is True:
            notes.append(f"stopped by SIGTERM before its last step, at step {run.part('state').get('step')}")
        found += [prefix + note for note in notes + run.problems]
    if not found:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in found)
    return f'<div class="card problems"><b>Read this first</b><ul>{items}</ul></div>'


def _outcome(runs: Sequence[RunRecord], colours: Sequence[str]) -> str:
    """The result as charts, before any table: the share of pairs ranked correctly, and the rewards."""
    drawn = [figure for chart in outcome_charts(runs) for figure in figures(chart, runs, colours)]
    if not drawn:
        return '<p class="note">The run logged no rewards and no NLL to plot.</p>'
    best = "".join(f"<p>{escape(line)}</p>" for run in runs for line in best_lines(run, several=len(runs) > 1))
    return f'{best}<p class="note">{_how_to_read(runs)}</p><div class="charts">{"".join(drawn)}</div>'


def _run_legend(runs: Sequence[RunRecord], colours: Sequence[str]) -> str:
    """The runs' names and colours; it stays in sight while the page is scrolled."""
    if len(runs) == 1:
        return ""
    items = (
        f'<span><i style="border-top:3px solid {colour}"></i>{escape(run.name)}</span>'
        for run, colour in zip(runs, colours, strict=True)
    )
    return f'<div class="runs">{"".join(items)}</div>'


def _charts(runs: Sequence[RunRecord], colours: Sequence[str]) -> str:
    shown = outcome_charts(runs)  # already in the Outcome section
    main = [figure for chart in CHARTS if chart not in shown for figure in figures(chart, runs, colours)]
    others = [figure for chart in other_charts(runs) for figure in figures(chart, runs, colours)]
    if not main and not others:
        return '<p class="note">There are no other numbers to plot.</p>'
    more = (
        f'<details><summary>Other logged numbers</summary><div class="charts">{"".join(others)}</div></details>'
        if others
        else ""
    )
    return f'<div class="charts">{"".join(main)}</div>{more}'


def _how_to_read(runs: Sequence[RunRecord]) -> str:
    longest = max(len(run.steps) for run in runs)
    parts = []
    if longest >= SMOOTH_FROM:
        window = smoothing_window(longest)
        parts.append(
            f"Faint line: every step. Strong line: moving mean of {window} steps (moving median for gradient norm, "
            "throughput and waiting for data)."
        )
    if any(run.evaluations for run in runs):
        parts.append("Circles: evaluations on held-out pairs.")
    if len(runs) == 1 and longest >= 40:
        parts.append("Numbers with an arrow: mean of the first 5 % of the steps → mean of the last 5 %.")
    if any(value is None for run in runs for name in _drawn_names(run) for _, value in points_of(run.steps, name)):
        parts.append("A gap in a line, with a tick above it: the number was not finite.")
    return " ".join(parts)


def _drawn_names(run: RunRecord) -> set[str]:
    return {name for row in run.steps for name in row} - UNCHARTED


def _skipped(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        title = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{title}<div class="card">{_skipped_of(run)}</div>')
    return "".join(parts)


def _skipped_of(run: RunRecord) -> str:
    if not run.skipped:
        return (
            "No pair was skipped."
            if not last_number(run.steps, "skipped_pairs")
            else "The list of skipped pairs is missing."
        )
    epochs: dict[tuple[str, str], list[str]] = {}
    for row in run.skipped:
        epochs.setdefault((str(row.get("id")), str(row.get("reason"))), []).append(str(row.get("epoch")))
    rows = [
        [text_markup(name), text_markup(reason), text_markup(f"epoch {', '.join(dict.fromkeys(seen))}")]
        for (name, reason), seen in list(epochs.items())[:MAX_SKIPPED]
    ]
    left = len(epochs) - len(rows)
    note = f'<p class="note">{whole_number(left)} more are in skipped_pairs.rank*.jsonl.</p>' if left else ""
    head = ["pair", "reason", "when"]
    found = table(head, rows[:MAX_OPEN], "rows free")
    if len(rows) > MAX_OPEN:
        found += f"<details><summary>{len(rows) - MAX_OPEN} more</summary>{table(head, rows[MAX_OPEN:], 'rows free')}</details>"
    skipped = (
        f"{whole_number(len(epochs))} different pairs were skipped, {whole_number(len(run.skipped))} times in total."
    )
    return f"<p>{skipped}</p>{found}{note}"


def _configs(runs: Sequence[RunRecord]) -> str:
    return "".join(
        f'<div class="card">{f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""}{_config(run)}</div>'
        for run in runs
    )


def _config(run: RunRecord) -> str:
    resolved = f"<details><summary>Full resolved config</summary><pre>{escape(run.config_text)}</pre></details>"
    if not run.config:
        return resolved if run.config_text else "No config was found."
    defaults = TrainConfig(model_name_or_path="-", train_file="-", output_dir="-")
    usual = {item.name: as_text(getattr(defaults, item.name)) for item in fields(TrainConfig)}
    rows = [
        [f"<code>{escape(name)}</code>", escape(as_text(value))]
        for name, value in run.config.items()
        if as_text(value) != usual.get(name)
    ]
    return f"<p class='soft'>Options that are not at their defaults</p>{table(['option', 'value'], rows, 'rows')}{resolved}"


def _versions(runs: Sequence[RunRecord]) -> str:
    known = [(run, run.part("versions")) for run in runs]
    names = list({name: None for _, versions in known for name in versions})
    if not names:
        return '<p class="note">Unknown: no checkpoint records the package versions.</p>'
    rows = [[escape(name), *(escape(str(versions.get(name, NO_NUMBER))) for _, versions in known)] for name in names]
    head = ["package", *(escape(f"{run.name}, {run.checkpoint}") if len(runs) > 1 else run.checkpoint for run in runs)]
    return table_card(head, rows, "several" if len(runs) > 1 else "")
