"""Facts about one loss: the function, what it needs, what it reads, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Literal

from synpo_fast.losses.pair import LossOutput


@dataclass(frozen=True)
class LossSpec:
    """One loss: the function that computes it, what it needs, and what it reads.

    needs_reference: a second `PairLogprobs` must be given (dpo: unless reference_free).
    reads: whether the contrast reads the sum or the mean of a response's log-probs (dpo's ipo variant: the mean). The
        metrics logps/chosen and logps/rejected are the same sums or means.
    reward, reward_unit: what the metrics rewards/... are, as a formula, and what they are measured in (units.py).
    has_nll: the loss includes an NLL on the chosen response.
    choices: the words that an option takes, for each option that takes words.
    """

    function: Callable[..., LossOutput]
    needs_reference: bool
    reads: Literal["sum", "mean"]
    reward: str
    reward_unit: str
    has_nll: bool
    formula: str
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def options(self) -> dict[str, float | str | bool]:
        """The function's keyword-only arguments with their defaults. The function itself checks their bounds."""
        arguments = signature(self.function).parameters.values()
        return {each.name: each.default for each in arguments if each.kind is Parameter.KEYWORD_ONLY}

    def reads_reference(self, options: Mapping[str, Any]) -> bool:
        """Whether a reference must be given with these options."""
        return self.needs_reference and not options.get("reference_free")
