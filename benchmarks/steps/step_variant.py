"""A variant of the training step: how it computes a loss from the workload, and its cost in passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.steps.workload import Workload

LossName = Literal["dpo", "simpo", "synpo"]
# Options of the losses, the papers' defaults; the same in every variant.
DPO_BETA, SIMPO_BETA, SIMPO_GAMMA = 0.1, 2.0, 0.5


@dataclass(frozen=True)
class Passes:
    """The passes that a variant computes, for the cost formula (cost.py).

    rows: the layout of the pairs in the language model: "padded" [2B, L]; "apart", each response after a copy of its prompt,
    without padding; "shared", each prompt once for the two responses of a pair; or "responses", each prompt once for all its
    responses, and each response once. language: passes of the language model over them, a backward counted as one.
    vision: passes of the tower over each video. head: products with the vocabulary for each row of head_rows: "all" rows, the
    "valid" ones that predict a response token, or "trl", which is valid ones on a GPU and all elsewhere.
    """

    rows: Literal["padded", "apart", "shared", "responses"]
    language: int
    vision: int
    head: int
    head_rows: Literal["all", "valid", "trl"]


@dataclass
class Scores:
    """The log-probs of every response that a forward computed, for the check; the chosen ones come first.

    tokens: [T] for each response. padded: [2B, L - 1] and its mask, split after the step because splitting waits for the GPU.
    sums: [2B], for a variant that has only those.
    """

    tokens: list[Tensor] | None = None
    padded: tuple[Tensor, Tensor] | None = None
    sums: Tensor | None = None

    def responses(self) -> list[Tensor] | None:
        if self.padded is not None:
            return [row[mask] for row, mask in zip(*self.padded, strict=True)]
        return self.tokens


@dataclass
class Forward:
    """The forward of a variant: loss(scores) -> scalar with autograd, which writes its log-probs into `scores`.

    setting: how the variant is called, in words. held_bytes: memory that it keeps between steps beyond weights and optimiser
    state, such as a second model.
    """

    loss: Callable[[Scores], Tensor]
    setting: str
    held_bytes: int = 0


@dataclass(frozen=True)
class StepVariant:
    """A named variant of the training step. `prepare` makes its forward for a workload."""

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
    """Returns a function that runs forward, backward and optimiser step. Gradients stay in the parameters for the check."""

    def run() -> StepResult:
        workload.optimizer.zero_grad(set_to_none=True)
        scores = Scores()
        loss = forward.loss(scores)
        loss.backward()
        workload.optimizer.step()
        return StepResult(variant, loss.detach(), scores)

    return run


def use_attention(workload: Workload, implementation: str, model: torch.nn.Module | None = None) -> None:
    """Sets the attention of the language model. Peers run transformers' on padded rows, this package its own on packed rows.

    model: the model to set, by default the policy's.
    """
    policy = workload.policy
    language_model: Any = policy.family.language_model(policy.base if model is None else model)
    language_model.config._attn_implementation = implementation


def peer_attention(workload: Workload) -> str:
    """The peers' attention: flash-attn on a GPU where it is installed, as TRL's and transformers' guides advise, else sdpa."""
    if workload.device.type == "cuda":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            return "sdpa"
        return "flash_attention_2"
    return "sdpa"


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
