"""One option of a run: a dataclass field that carries its help text, its group, and the values it takes."""

from __future__ import annotations

from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class OptionFacts:
    """The facts of an option beside its name, type and default.

    group: the title it stands under in the help.
    choices: the words it takes; empty: any.
    above, at_least, below, at_most: bounds of a number. Every number must be finite, whether it has bounds or not.
    is_path: a file or folder, kept as an absolute path.
    of_loss: an option of the same name of one or more losses, which know its default and its bounds. None leaves it to the loss.
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

    @property
    def bounds(self) -> dict[str, float]:
        bounds = {"above": self.above, "at_least": self.at_least, "below": self.below, "at_most": self.at_most}
        return {name: bound for name, bound in bounds.items() if bound is not None}


def option(default: Any, text: str = "", choices: tuple[str, ...] = (), *, group: str, **facts: Any) -> Any:
    """A dataclass field with its OptionFacts. A default that can be called makes the value."""
    metadata = {"facts": OptionFacts(group, text, choices, **facts)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def facts_of(item: Field[Any]) -> OptionFacts:
    return item.metadata["facts"]
