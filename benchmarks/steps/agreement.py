"""The truth that every variant is compared with before its time is shown: each response run alone, the loss written out.

Each row has one response without padding. The truth uses transformers' own forward with sdpa, fp32 log-softmax of the
materialised logits at the rows that predict the response, the paper's formula, and autograd. A variant's token log-probs (or
their sums, if it has only those), loss and gradient of the adapter must agree. The tolerances in fp32 are some hundred times the
measured errors, and far below the effect of one wrong token or position. In bf16 they allow for the rounding of 28 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.steps.step_variant import (
    DPO_BETA,
    SIMPO_BETA,
    SIMPO_GAMMA,
    LossName,
    StepResult,
    use_attention,
)
from benchmarks.steps.workload import Workload, model_inputs, padded_batch
from synpo_fast.models import Sample

# log_probs: mean absolute difference over a response's tokens, of the worst response; loss: absolute difference;
# grad: ||g - truth|| / ||truth||
TOLERANCES = {
    torch.float32: {"log_probs": 1e-4, "loss": 1e-4, "grad": 1e-3},
    torch.bfloat16: {"log_probs": 0.1, "loss": 0.1, "grad": 0.3},
}


@dataclass(frozen=True)
class Truth:
    """Exact log-probs, and the loss and the adapter's gradient for each loss."""

    log_probs: list[Tensor]  # of each response, the chosen ones first
    losses: dict[LossName, Tensor]
    grads: dict[LossName, list[Tensor]]


def find_truth(workload: Workload, losses: Sequence[LossName]) -> Truth:
    """Computes the truth one pair at a time, to bound memory."""
    model: Any = workload.policy.model
    use_attention(workload, "sdpa")
    count = len(workload.samples)
    rows: list[list[Tensor]] = [[], []]
    values: dict[LossName, Tensor] = {}
    grads: dict[LossName, list[Tensor]] = {}
    for name in losses:
        workload.optimizer.zero_grad(set_to_none=True)
        rows, total = [[], []], torch.zeros((), device=workload.device)
        for sample in workload.samples:
            with torch.no_grad(), model.disable_adapter():
                reference = [alone(workload, sample, which) for which in range(2)]
            logps = [alone(workload, sample, which) for which in range(2)]
            loss = FORMULAS[name](logps, reference) / count
            loss.backward()
            total += loss.detach()
            for which in range(2):
                rows[which].append(logps[which].detach())
        values[name], grads[name] = total, gradients(workload)
    workload.optimizer.zero_grad(set_to_none=True)
    return Truth([*rows[0], *rows[1]], values, grads)


def alone(workload: Workload, sample: Sample, which: int) -> Tensor:
    """[T] fp32: token log-probs of one response."""
    policy = workload.policy
    batch = {name: t.to(workload.device) for name, t in padded_batch(policy, [sample], (which,)).items()}
    length = len(sample.responses[which])
    hidden = policy.base.base_model(**model_inputs(batch), use_cache=False).last_hidden_state[0, -length - 1 : -1]
    logits = policy.base.get_output_embeddings()(hidden).float()
    return logits.log_softmax(-1).gather(1, batch["input_ids"][0, -length:, None]).squeeze(1)


def gradients(workload: Workload) -> list[Tensor]:
    """Copies of the adapter's gradients, since later steps overwrite them."""
    groups = workload.optimizer.param_groups
    return [p.grad.detach().clone() for group in groups for p in group["params"] if p.grad is not None]


def _dpo(logps: list[Tensor], reference: list[Tensor]) -> Tensor:
    chosen, rejected = (own.sum() - other.sum() for own, other in zip(logps, reference, strict=True))
    return -F.logsigmoid(DPO_BETA * (chosen - rejected))


def _simpo(logps: list[Tensor], reference: list[Tensor]) -> Tensor:
    return -F.logsigmoid(SIMPO_BETA * (logps[0].mean() - logps[1].mean()) - SIMPO_GAMMA)


def _synpo(logps: list[Tensor], reference: list[Tensor]) -> Tensor:
    contrast = logps[0].mean().exp() - logps[1].mean().exp()
    return -torch.sigmoid(30.0 * contrast) - 0.2 * logps[0].exp().mean()


FORMULAS = {"dpo": _dpo, "simpo": _simpo, "synpo": _synpo}


def errors(result: StepResult, truth: Truth, workload: Workload) -> dict[str, float]:
    """Errors of a step against the truth. Call it right after the step, since it reads gradients from the parameters."""
    scores, tokens = result.scores, result.scores.responses()
    if tokens is not None:
        shapes = [tuple(row.shape) for row in tokens], [tuple(row.shape) for row in truth.log_probs]
        if shapes[0] != shapes[1]:
            raise ValueError(f"token log-probs of shapes {shapes[0]}, expected {shapes[1]}")
        pairs = zip(tokens, truth.log_probs, strict=True)
        difference = max(float((own - true).abs().mean()) for own, true in pairs)
    else:
        assert scores.sums is not None, "a variant records its log-probs"
        lengths = torch.tensor([len(row) for row in truth.log_probs], device=scores.sums.device)
        true_sums = torch.stack([row.sum() for row in truth.log_probs])
        difference = float(((scores.sums - true_sums) / lengths).abs().max())
    found, expected = gradients(workload), truth.grads[result.variant.loss]
    if len(found) != len(expected):
        raise ValueError(f"gradients for {len(found)} parameters, expected {len(expected)}")
    squares = sum(float((own.float() - true.float()).square().sum()) for own, true in zip(found, expected, strict=True))
    size = sum(float(true.float().square().sum()) for true in expected)
    return {
        "log_probs": difference,
        "loss": float((result.loss.float() - truth.losses[result.variant.loss]).abs()),
        "grad": (squares / size) ** 0.5,
    }


def why_wrong(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """Lists the errors above their tolerances; None if there are none. NaN is above."""
    bounds = TOLERANCES[dtype]
    bad = [f"{name} {error:.2g} > {bounds[name]:g}" for name, error in found.items() if not error <= bounds[name]]
    return ", ".join(bad) or None
