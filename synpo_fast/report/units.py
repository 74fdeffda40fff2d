"""The units of a run's numbers, from its config. Numbers of different units share neither an axis nor an unlabelled table row."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from synpo_fast.losses import spec_of
from synpo_fast.losses.units import LOGPS_UNITS, SFT, logps_unit, loss_unit, reward_unit
from synpo_fast.losses.weighted_sum import members_of
from synpo_fast.report.data import RunRecord, number_in
from synpo_fast.report.formats import NO_NUMBER

# The quantities whose unit depends on the loss and its options.
LOSS, GRADIENT, REWARD, LOGPS, REWARD_GRADIENT = "loss", "gradient", "reward", "logps", "reward gradient"
MEMBER = "member"  # one of several losses that are added up
UNKNOWN = "unit not known"


def unit_of(run: RunRecord, quantity: str) -> str:
    """The unit of a quantity above; "" for the quantity "", which stands for a number with the same meaning in every run."""
    if not quantity:
        return ""
    name = run.config.get("loss_type")
    if not isinstance(name, str) or (name != SFT and not _is_loss(name)):
        return UNKNOWN
    if quantity in (LOSS, GRADIENT, MEMBER):
        loss = loss_unit(name, _options(run, name), auxiliary_nll=number_in(run.config.get("auxiliary_nll")) or 0.0)
        return loss if quantity == LOSS else f"of the {'NLL' if name == SFT else loss}"
    if name == SFT:
        return LOGPS_UNITS["mean"]
    if quantity == LOGPS:
        return logps_unit(name)
    unit = reward_unit(name, _options(run, name))
    return unit if quantity == REWARD else f"{name}, of {spec_of(name).reward}, {unit}"


def accuracy_label(runs: Sequence[RunRecord]) -> str:
    """The name of rewards/accuracies: losses of pairs count pairs, losses of single responses (kto) count responses."""
    losses = [run.config.get("loss_type") for run in runs]
    single = [isinstance(loss, str) and _is_loss(loss) and spec_of(loss).unpaired for loss in losses]
    of_responses = "responses on the right side of the reference point"
    if any(single) and not all(single):
        return f"pairs ranked correctly, or {of_responses}"
    return of_responses if any(single) else "pairs ranked correctly"


def by_unit(
    runs: Sequence[RunRecord], colours: Sequence[str], quantity: str
) -> list[tuple[str, list[RunRecord], list[str]]]:
    """(unit, runs, their colours) of each unit, in the order of the runs. A run with an unknown unit is in a group of its own."""
    found: dict[tuple[str, int], tuple[str, list[RunRecord], list[str]]] = {}
    for number, (run, colour) in enumerate(zip(runs, colours, strict=True)):
        unit = unit_of(run, quantity)
        _, members, hues = found.setdefault((unit, number if unit == UNKNOWN else -1), (unit, [], []))
        members.append(run)
        hues.append(colour)
    return list(found.values())


def with_units(label: str, cells: Sequence[str], units: Sequence[str]) -> list[str]:
    """A table row of several runs. A unit that all share is written beside the label, else each number has its own."""
    used = {unit for unit, cell in zip(units, cells, strict=True) if cell != NO_NUMBER}
    if len(used) == 1 and UNKNOWN not in used:
        return [label + unit_markup(used.pop()), *cells]
    return [
        label,
        *(cell + (unit_markup(unit) if cell != NO_NUMBER else "") for unit, cell in zip(units, cells, strict=True)),
    ]


def unit_markup(unit: str) -> str:
    """The unit in small type; "" for no unit."""
    return f'<span class="unit">{escape(unit)}</span>' if unit else ""


def _is_loss(name: str) -> bool:
    try:
        return bool(members_of(name))
    except ValueError:
        return False


def _options(run: RunRecord, name: str) -> dict[str, Any]:
    """The loss's options as the config sets them; None for a value of the wrong type, so that the loss uses its default."""
    if name == SFT:
        return {}
    found: dict[str, Any] = {}
    for option, default in spec_of(name).options.items():
        value = run.config.get(option)
        if isinstance(default, tuple):
            numbers = [number_in(each) for each in value] if isinstance(value, list) else []
            found[option] = numbers if len(numbers) == len(default) and None not in numbers else None
        elif isinstance(default, str | bool):
            found[option] = value if isinstance(value, type(default)) else None
        else:
            found[option] = number_in(value)
    return found
