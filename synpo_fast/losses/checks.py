"""Option checks shared by the losses. Each raises a ValueError that names the option and its value."""

from __future__ import annotations

import math
from collections.abc import Collection


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    if isinstance(value, float) and not math.isfinite(value):  # isfinite fails on a huge int
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    if above is not None and not value > above:
        raise ValueError(f"{name} is {value!r}, expected more than {above}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{name} is {value!r}, expected at least {at_least}")
    if below is not None and not value < below:
        raise ValueError(f"{name} is {value!r}, expected less than {below}")
    if at_most is not None and not value <= at_most:
        raise ValueError(f"{name} is {value!r}, expected at most {at_most}")


def check_label_smoothing(label_smoothing: object, variant: str) -> None:
    """Checks the range of label_smoothing, and that the variant supports it: only the log-sigmoid has a smoothed form."""
    check_number("label_smoothing", label_smoothing, at_least=0.0, below=0.5)
    if variant != "sigmoid" and label_smoothing != 0.0:
        raise ValueError(f"label_smoothing is {label_smoothing!r}, but variant {variant!r} has no smoothed form")
