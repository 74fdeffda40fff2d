"""One option of a run: a dataclass field that carries its help text, its group, and the values it takes."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptionFacts:
    """The facts about an option besides its name, type and default.

    group: the title of its section in the help. text: its help text.
    choices: the words it accepts; empty: any. several: it also accepts several of them, separated by commas.
    above, at_least, below, at_most: bounds of a number. Every number must be finite, with or without bounds.
    is_path: the value is a file or folder, kept as an absolute path.
    of_loss: one or more losses have an option of this name, and define its default and bounds; None means the loss's default.
    """

    group: str
    text: str
    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    is_path: bool = False
    of_loss: bool = False
    several: bool = False

    @property
    def bounds(self) -> dict[str, float]:
        bounds = {"above": self.above, "at_least": self.at_least, "below": self.below, "at_most": self.at_most}
        return {name: bound for name, bound in bounds.items() if bound is not None}


def option(default: Any, text: str = "", choices: tuple[str, ...] = (), *, group: str, **facts: Any) -> Any:
    """Returns a dataclass field that carries its OptionFacts. A callable default is used as a default_factory."""
    metadata = {"facts": OptionFacts(group, text, choices, **facts)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def facts_of(item: Field[Any]) -> OptionFacts:
    return item.metadata["facts"]
