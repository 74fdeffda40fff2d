"""Reads the files in a run's folder for its report.

A report is needed most after a failure, so nothing here raises for the content of a file. A file that is missing, truncated or
malformed adds a sentence to `problems`, which the page shows; all other files are still read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synpo_fast.run_folder.checkpoint import STATE, list_checkpoints

EVALUATION = "eval_"
SHOWN_LINES = 5  # at most so many malformed lines of a file are listed
LARGEST = 1e100  # larger numbers count as infinite, since their squares could overflow
Row = dict[str, Any]


@dataclass
class RunRecord:
    """The content of a run's folder.

    name: the run's name on the page. steps, evaluations: rows sorted by step; evaluations have only the eval_ metrics.
    config_text is the text of config.yaml, config its parsed content; trainer is the newest checkpoint's trainer.json.
    trained is False for a folder that holds only a profile.
    """

    folder: Path
    name: str
    steps: list[Row] = field(default_factory=list)
    evaluations: list[Row] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    trainer: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    skipped: list[Row] = field(default_factory=list)
    profile: dict[str, Any] | None = None
    trained: bool = True
    problems: list[str] = field(default_factory=list)

    def part(self, name: str) -> dict[str, Any]:
        """A mapping inside trainer.json (state, versions, facts); empty if it is missing or not a mapping."""
        value = self.trainer.get(name)
        return value if isinstance(value, dict) else {}


def read_run(folder: Path, name: str) -> RunRecord:
    """Reads a run's folder; problems with its files are noted in the record."""
    run = RunRecord(folder, name)
    _read_metrics(run)
    _read_config(run)
    _read_checkpoint(run)
    if run.config.get("loss_type") == "sft":
        _drop_comparisons(run)
    for file in sorted(folder.glob("skipped_pairs.rank*.jsonl")):
        run.skipped += [row for _, row in _rows(file, run.problems)]
    run.profile = read_json_object(folder / "profile.json", run.problems)
    if run.profile is not None and not (folder / "metrics.jsonl").exists():
        # A profile trains nothing, so missing metrics, checkpoints and config.yaml are not problems.
        run.problems, run.trained = [], False
        config = run.profile.get("config")
        run.config = run.config or (config if isinstance(config, dict) else {})
    return run


def read_json_object(file: Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or, with a problem noted, holds no object."""
    text = _text(file, problems)
    if text is None:
        return None
    value = _parsed(text)
    if isinstance(value, dict):
        return value
    problems.append(f"{file.name} is not a JSON object")
    return None


def number_in(value: Any) -> float | None:
    """The value as a float if it is a finite number below LARGEST, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < LARGEST else None  # False for nan


def _read_metrics(run: RunRecord) -> None:
    file = run.folder / "metrics.jsonl"
    if not file.exists():
        run.problems.append("there is no metrics.jsonl: nothing was logged, or this is not a run's folder")
        return
    steps: dict[int, Row] = {}
    evaluations: dict[int, Row] = {}
    without_step = 0
    for _, row in _rows(file, run.problems):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or abs(step) > 2**53:
            without_step += 1
            continue
        evaluated = {name: value for name, value in row.items() if name.startswith(EVALUATION)}
        trained = {name: value for name, value in row.items() if name not in evaluated and name != "step"}
        # A file edited by hand may hold a step twice: the later row counts.
        for place, part in ((steps, trained), (evaluations, evaluated)):
            if part:
                place[step] = {"step": step, **part}
    if without_step:
        run.problems.append(f"{without_step} rows of metrics.jsonl have no step and are ignored")
    if not steps:
        run.problems.append("metrics.jsonl holds no training step")
    run.steps = [steps[step] for step in sorted(steps)]
    run.evaluations = [evaluations[step] for step in sorted(evaluations)]


def _read_config(run: RunRecord) -> None:
    import yaml

    text = _text(run.folder / "config.yaml", run.problems)
    if text is None:
        run.problems.append("there is no config.yaml that can be read")
        return
    run.config_text = text
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1})" if mark is not None else ""
        run.problems.append(f"config.yaml cannot be parsed as YAML{place}: no option is known")
        return
    if isinstance(content, dict):
        run.config = {str(name): value for name, value in content.items()}
    else:
        run.problems.append("config.yaml does not map options to values")


def _read_checkpoint(run: RunRecord) -> None:
    checkpoints = list_checkpoints(run.folder)
    if not checkpoints:
        run.problems.append("there is no checkpoint, so the versions of the packages are not known")
        return
    run.checkpoint = checkpoints[-1].name
    found = read_json_object(checkpoints[-1] / STATE / "trainer.json", run.problems)
    if found is None:
        run.problems.append(f"{run.checkpoint} has no trainer.json that can be read: versions are not known")
    run.trainer = found or {}


def _drop_comparisons(run: RunRecord) -> None:
    """Removes rewards and log-probs of a supervised run: it compares no pairs, and the 0 that is logged looks like a result."""
    for row in run.steps + run.evaluations:
        for name in [name for name in row if name.removeprefix(EVALUATION).startswith(("rewards/", "logps/"))]:
            del row[name]


def _rows(file: Path, problems: list[str]) -> Iterator[tuple[int, Row]]:
    """Yields (line number, object) for each line that holds a JSON object; all other lines are named in one problem."""
    text = _text(file, problems) or ""
    broken = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        value = _parsed(line)
        if isinstance(value, dict):
            yield number, value
        else:
            broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:SHOWN_LINES])) + (", ..." if len(broken) > SHOWN_LINES else "")
        lines = "line" if len(broken) == 1 else f"{len(broken)} lines:"
        problems.append(f"{file.name}: no JSON object in {lines} {shown} (ignored)")


def _text(file: Path, problems: list[str]) -> str | None:
    if not file.exists():
        return None
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror or error}")
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
