"""A variant of training: how it gets from the workload to a loss, and what it computes, counted in passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.steps.workload import Workload

LossName = Literal["dpo", "simpo", "synpo"]
# The losses' options, the same in every variant: the papers' defaults.
DPO_BETA, SIMPO_BETA, SIMPO_GAMMA = 0.1, 2.0, 0.5


@dataclass(frozen=True)
class Passes:
    """Counts of what a variant computes, for the cost formula (cost.py).

    rows: how the language model sees the pairs: "padded" [2B, L], each response "apart" behind a copy of its prompt without
    padding, or "shared", each prompt once. language: forward passes' worth of work on them, a backward being one.
    vision: passes of the tower over each video. head: products with the vocabulary for each row in head_rows: "all" of them,
    those "valid" that predict a response token, or as "trl" does it, valid ones on a GPU and all elsewhere.
    """

    rows: Literal["padded", "apart", "shared"]
    language: int
    vision: int
    head: int
    head_rows: Literal["all", "valid", "trl"]


@dataclass
class Scores:
    """Findings of a forward, for the check: log-probs of every response, the chosen ones first. tokens: [T] each, or padded:
    [2B, L - 1] and its mask, taken apart after the step since that waits for a GPU; sums: [2B], where a variant has no others."""

    tokens: list[Tensor] | None = None
    padded: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None

    def responses(self) -> list[Tensor] | None:
        if self.padded is not None:
            return [row[mask] for row, mask in zip(*self.padded, strict=True)]
        return self.tokens


@dataclass
class Forward:
    """loss(scores) -> scalar with autograd, writing what it found into `scores`. held_bytes: what it keeps between steps
    beyond weights and optimiser, a second model for instance. setting: how the peer is called, in words."""

    loss: Callable[[Scores], Tensor]
    setting: str
    held_bytes: int = 0


@dataclass(frozen=True)
class StepVariant:
    name: str
    loss: LossName
    passes: Passes
    prepare: Callable[[Workload], Forward]
    ours: bool = False
    title: str = ""  # in the picture of the gains


@dataclass
class StepResult:
    variant: StepVariant
    loss: Tensor
    scores: Scores


def full_step(workload: Workload, variant: StepVariant, forward: Forward) -> Callable[[], StepResult]:
    """Forward, backward and optimiser step; the gradients stay in the parameters for the check."""

    def run() -> StepResult:
        workload.optimizer.zero_grad(set_to_none=True)
        scores = Scores()
        loss = forward.loss(scores)
        loss.backward()
        workload.optimizer.step()
        return StepResult(variant, loss.detach(), scores)

    return run


def use_attention(workload: Workload, implementation: str, model: torch.nn.Module | None = None) -> None:
    """Peers run transformers' attention over padded rows, this package its own over packed ones, on the same weights.

    model: another one than the policy's own.
    """
    policy = workload.policy
    language_model: Any = policy.family.language_model(policy.base if model is None else model)
    language_model.config._attn_implementation = implementation


def peer_attention(workload: Workload) -> str:
    """flash-attn where it is installed, as TRL's and transformers' guides advise on GPUs, else sdpa."""
    if workload.device.type == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
