"""torch's AdamW under DeepSpeed, with states that exist before the first step, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """torch's AdamW as DeepSpeed uses it: on whole parameters (stage 0) or on flat shards (stages 1-3)."""

    @torch.no_grad()
    def make_states(self, parameters: Iterable[Tensor]) -> None:
        """Creates the states of step 0, so that they can be read, or filled from a checkpoint, at any time."""
        for parameter in parameters:
            state: dict[str, Any] = self.state[parameter]
            assert not state
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def set_step(self, step: int) -> None:
        for state in self.state.values():
            state["step"].fill_(float(step))

    @property
    def steps_taken(self) -> int:
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate


def make_optimizer(
    module: nn.Module, *, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> AdamW:
    """AdamW with weight decay on matrices but not on vectors (norms, biases). Raises UserError if no parameter trains."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise UserError("no parameter trains: with use_peft=false the language model must be trainable")
    matrices, vectors = _split(trained)
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": weight_decay}] if matrices else []
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)


def _split(parameters: Iterable[nn.Parameter]) -> tuple[list[Tensor], list[Tensor]]:
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    return matrices, vectors


def learning_rate_at(step: int, *, peak: float, num_steps: int, num_warmup: int, shape: str) -> float:
    """The learning rate of optimiser step `step` (from 0). It is above 0 at every step, so a run of one step learns too: warm-up
    rises as (step + 1) / num_warmup, and linear and cosine reach 0 one step after the last."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    if shape in ("constant", "constant_with_warmup"):
        return peak
    left = (num_steps - step) / max(1, num_steps - num_warmup)
    left = min(1.0, max(0.0, left))
    return peak * left if shape == "linear" else peak * 0.5 * (1.0 - math.cos(math.pi * left))


def warmup_steps(*, num_steps: int, steps: int, ratio: float, shape: str) -> int:
    """The number of warm-up steps: `steps` if set, else `ratio` of the run, rounded up; 0 for the constant shape."""
    if shape == "constant":
        return 0
    return min(num_steps, steps or math.ceil(ratio * num_steps))
