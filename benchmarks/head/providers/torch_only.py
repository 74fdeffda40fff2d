"""Contestants that need only PyTorch: the bare GEMMs (the floor), eager, and torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest import Step
from benchmarks.head.problem import IGNORE_INDEX, Inputs
from benchmarks.head.providers.base import differentiated, on_valid_rows


def _token_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Token log-probs: [N, D], [V, D], [N] -> [N], with logits in the inputs' dtype and softmax in fp32."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def gemm_floor(inputs: Inputs) -> Step:
    """The GEMMs that every contestant needs, on valid rows gathered beforehand, into buffers allocated beforehand."""
    hidden, weight = inputs.hidden.detach()[inputs.valid], inputs.weight.detach()
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if inputs.mode == "train" else None
    grad_weight = torch.empty_like(weight) if grad_hidden is not None and inputs.head == "trainable" else None

    def run() -> None:
        torch.mm(hidden, weight.T, out=logits)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight)

    num_gemms = 1 + (grad_hidden is not None) + (grad_weight is not None)
    return Step(run, f"{num_gemms} bare GEMM{'s' if num_gemms > 1 else ''} on valid rows, outputs reused", exact=False)


def eager_all_rows(inputs: Inputs) -> Step:
    def forward() -> Tensor:
        mask = inputs.labels != IGNORE_INDEX
        labels = inputs.labels.masked_fill(~mask, 0)
        return _token_log_probs(inputs.hidden, inputs.weight, labels).masked_fill(~mask, 0.0)

    return differentiated(forward, inputs, "logits of all rows, fp32 log_softmax, gather, mask")


def eager_valid_rows(inputs: Inputs) -> Step:
    forward = on_valid_rows(lambda hidden, labels: _token_log_probs(hidden, inputs.weight, labels), inputs)
    return differentiated(forward, inputs, "hidden[mask] first, then fp32 log_softmax and gather")


def torch_compile(inputs: Inputs) -> Step:
    """The compiled head. It uses F.cross_entropy, which the compiler fuses better than log_softmax and gather."""

    @torch.compile(dynamic=False)
    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy((hidden @ inputs.weight.T).float(), labels, reduction="none")

    forward = on_valid_rows(token_log_probs, inputs)
    return differentiated(forward, inputs, "hidden[mask] first, then fp32 F.cross_entropy, compiled with dynamic=False")
