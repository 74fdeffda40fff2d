"""The type of a provider, a function from the inputs of a case to the timed step, and helpers for several providers.

A provider with several settings returns a step for each; the fastest one whose result is right competes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import IGNORE_INDEX, Inputs, Result

Provider = Callable[[Inputs], Step | Sequence[Step]]


@dataclass(frozen=True)
class Computes:
    """A contestant's work in words, for the JSON and the README. A product is one of N x D x V."""

    rows: str  # valid: only those whose label is not ignored; given: it would compute all, and gets the valid ones only
    output: str
    logits: str  # the logits, or their gradient, that it stores at once
    products: str  # with a frozen / a trainable head
    gradients: str
    sums: str  # the dtype in which the head's gradient is added up over rows


def differentiated(forward: Callable[[], Tensor], inputs: Inputs, setting: str) -> Step:
    """Makes a step from `forward() -> log-probs [R]`, with gradients by autograd."""

    def run() -> Result:
        if inputs.mode == "no_grad":
            with torch.no_grad():
                return Result(forward())
        log_probs = forward()
        if inputs.head == "trainable":
            grads = torch.autograd.grad(log_probs, [inputs.hidden, inputs.weight], inputs.upstream)
            return Result(log_probs.detach(), *grads)
        return Result(log_probs.detach(), *torch.autograd.grad(log_probs, [inputs.hidden], inputs.upstream))

    return Step(run, setting)


def on_valid_rows(token_log_probs: Callable[[Tensor, Tensor], Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    """A forward that drops the ignored rows, for peers that do not; dropping is timed. token_log_probs: [N, D], [N] -> [N]."""

    def forward() -> Tensor:
        mask = inputs.labels != IGNORE_INDEX
        log_probs = token_log_probs(inputs.hidden[mask], inputs.labels[mask])
        return torch.zeros_like(inputs.upstream).masked_scatter(mask, log_probs.float())

    return forward


def need_cuda(inputs: Inputs, what: str) -> None:
    if inputs.hidden.device.type != "cuda":
        raise Unavailable(f"{what} needs a GPU")
