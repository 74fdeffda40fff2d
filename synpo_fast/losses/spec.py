"""LossSpec: the description of one loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Literal

from synpo_fast.losses.pair import LossOutput, PairLogprobs

Options = dict[str, Any]  # a loss's options by name: numbers, words, bool, and loss_weights of a sum


@dataclass(frozen=True)
class LossSpec:
    """One loss: the function that computes it, its inputs, its rewards and its options.

    needs_reference: True if a second `PairLogprobs` must be given (dpo: unless reference_free).
    reads: "sum" or "mean": the reduction of a response's log-probs that the loss compares (ipo and sigmoid_norm compare means,
        but report sums). The metrics logps/chosen and logps/rejected are the same sums or means.
    reward, reward_unit: formula and unit of the metrics rewards/... (see units.py).
    has_nll: True if the loss includes an NLL on the chosen response.
    unpaired: True if the loss reads each response by itself, so that a row may be one labelled response instead of a pair.
    needs_kl: True if it reads policy.kl, an estimate from mismatched responses (kto.py).
    choices: allowed values of each option that takes a word.
    sorts_batch: True if the loss compares sorted values of a batch (aot): weights per pair have no meaning then.
    """

    function: Callable[..., LossOutput]
    reads: Literal["sum", "mean"]
    reward: str
    reward_unit: str
    formula: str
    needs_reference: bool = False
    has_nll: bool = False
    unpaired: bool = False
    needs_kl: bool = False
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sorts_batch: bool = False

    @cached_property
    def options(self) -> Options:
        """The function's keyword-only arguments and their defaults. The function itself checks their values."""
        arguments = signature(self.function).parameters.values()
        return {each.name: each.default for each in arguments if each.kind is Parameter.KEYWORD_ONLY}

    def reads_reference(self, options: Options) -> bool:
        """True if a reference must be given with these options."""
        return self.needs_reference and not options.get("reference_free")

    def compute(self, policy: PairLogprobs, reference: PairLogprobs | None, options: Options) -> LossOutput:
        """Calls the function, with the reference only if the loss has such an argument."""
        return self.function(policy, reference, **options) if self.needs_reference else self.function(policy, **options)
