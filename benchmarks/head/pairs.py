"""Compares whole SimPO losses on pairs: Liger's chunked class and this package's fused class, called the same way.

L = mean over pairs of -log sigmoid(beta * (mean lp+ - mean lp-) - gamma), frozen head, gradient to the hidden states.
Both take hidden states [2B, T, D] and labels [2B, T], the chosen half first. Loss and gradient are compared with fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import format_bytes, format_error, format_seconds, format_table
from benchmarks.contest import Options, Step, run_contest
from benchmarks.head.problem import (
    DTYPES,
    IGNORE_INDEX,
    SEQUENCE_LENGTH,
    Inputs,
    fp64_truth,
    make_inputs,
    relative_error,
    why_wrong,
)
from benchmarks.head.providers.torch_only import gemm_floor
from benchmarks.head.shapes import SHAPES, Shape
from synpo_fast.profiling.rounds import median_ratio

BETA, GAMMA = 2.0, 0.5
PEER, OWN = "liger-simpo", "synpo-simpo"


@dataclass(frozen=True)
class LossResult:
    """A contestant's loss and its gradient to the hidden states."""

    loss: Tensor
    grad_hidden: Tensor  # [R, D]


def simpo(token_log_probs: Tensor, labels: Tensor) -> Tensor:
    """SimPO's formula, for the truth and for eager: [2B, T], [2B, T] -> scalar."""
    mask = labels != IGNORE_INDEX
    means = (token_log_probs * mask).sum(-1) / mask.sum(-1)
    chosen, rejected = means.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected) - GAMMA).mean()


def _sequences(inputs: Inputs) -> tuple[Tensor, Tensor]:
    num_sequences = inputs.labels.shape[0] // SEQUENCE_LENGTH
    return inputs.hidden.view(num_sequences, SEQUENCE_LENGTH, -1), inputs.labels.view(num_sequences, SEQUENCE_LENGTH)


def _differentiated(loss: Callable[[], Tensor], inputs: Inputs, setting: str) -> Step:
    def run() -> Any:
        value = loss()
        return LossResult(value.detach(), *torch.autograd.grad(value, [inputs.hidden]))

    return Step(run, setting)


def eager(inputs: Inputs) -> Step:
    def loss() -> Tensor:
        hidden, labels = _sequences(inputs)
        mask = labels != IGNORE_INDEX
        logits = (hidden[mask] @ inputs.weight.T).float()
        log_probs = logits.log_softmax(-1).gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1)
        return simpo(torch.zeros_like(labels, dtype=torch.float32).masked_scatter(mask, log_probs), labels)

    return _differentiated(loss, inputs, "hidden[mask] first, then fp32 log_softmax and gather")


def liger(inputs: Inputs, *, compiled: bool = True) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearSimPOLoss

    module = LigerFusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False, compiled=compiled)

    def loss() -> Tensor:
        hidden, labels = _sequences(inputs)
        return module(inputs.weight, hidden, labels)[0]

    return _differentiated(loss, inputs, f"LigerFusedLinearSimPOLoss(compute_nll_loss=False, compiled={compiled})")


def ours(inputs: Inputs) -> Step:
    from synpo_fast.fused import FusedLinearSimPOLoss

    module = FusedLinearSimPOLoss(beta=BETA, gamma=GAMMA, compute_nll_loss=False)

    def loss() -> Tensor:
        hidden, labels = _sequences(inputs)
        return module(inputs.weight, hidden, labels)[0]

    return _differentiated(loss, inputs, "FusedLinearSimPOLoss(compute_nll_loss=False)")


CONTESTANTS: dict[str, Callable[[Inputs], Step]] = {
    "gemm-floor": gemm_floor,
    "eager-valid-rows": eager,
    PEER: liger,
    f"{PEER}-uncompiled": partial(liger, compiled=False),
    OWN: ours,
}


def simpo_truth(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The truth in fp64: the loss, the compared rows [K], and the loss's gradient to their hidden states [K, D]."""
    every = fp64_truth(inputs, num_rows=len(inputs.valid), with_weight=False)
    log_probs = torch.zeros(inputs.labels.shape, dtype=torch.float64, device=inputs.labels.device)
    log_probs[every.rows] = every.log_probs
    log_probs.requires_grad_()
    loss = simpo(log_probs.view(-1, SEQUENCE_LENGTH), _sequences(inputs)[1])
    (upstream,) = torch.autograd.grad(loss, [log_probs])
    truth = fp64_truth(replace(inputs, upstream=upstream), num_rows=512, with_weight=False)
    return loss.detach(), truth.rows, truth.grad_hidden


def compare_pairs(
    options: Options,
    *,
    dtype: str,
    num_pairs: int = 2,
    valid: float = 0.25,
    shape: Shape = SHAPES["cpu-small"],
    contestants: dict[str, Callable[[Inputs], Step]] = CONTESTANTS,
) -> dict[str, Any]:
    """Runs the comparison and returns one JSON record: rows as in kernels.py, and our time and memory divided by Liger's."""
    num_rows = 2 * num_pairs * SEQUENCE_LENGTH
    inputs = make_inputs(
        shape, num_rows=num_rows, valid=valid, dtype=DTYPES[dtype], device=options.device, seed=options.seed
    ).case(head="frozen", mode="train")
    loss, rows, grad_hidden = simpo_truth(inputs)

    def errors(result: LossResult) -> dict[str, float]:
        return {
            "loss": relative_error(result.loss, loss),
            "grad_hidden": relative_error(result.grad_hidden[rows], grad_hidden),
        }

    baseline: Any = eager(inputs).run()
    eager_errors = errors(baseline)
    del baseline

    def judge(result: Any) -> tuple[dict[str, float], str | None]:
        found = errors(result)
        return found, why_wrong(found, eager_errors, inputs.hidden.dtype)

    records = run_contest(
        {name: partial(make, inputs) for name, make in contestants.items()}, judge, floor="gemm-floor", options=options
    )
    torch.compiler.reset()
    by_name = {record["name"]: record for record in records}
    return {
        "shape": shape.name,
        "D": shape.D,
        "V": shape.V,
        "pairs": num_pairs,
        "T": SEQUENCE_LENGTH,
        "valid": valid,
        "dtype": dtype,
        "ratio_to_liger": _ratio(by_name.get(OWN), by_name.get(PEER)),
        "rows": records,
    }


def _ratio(own: dict[str, Any] | None, peer: dict[str, Any] | None) -> dict[str, float] | None:
    if own is None or peer is None or own["skipped"] is not None or peer["skipped"] is not None:
        return None
    return {
        "time": median_ratio(own["seconds"]["samples"], peer["seconds"]["samples"]),
        "peak_extra": own["peak_extra_bytes"] / peer["peak_extra_bytes"],
    }


def pairs_table(comparison: dict[str, Any]) -> str:
    lines = []
    for row in comparison["rows"]:
        seconds, memory = row["seconds"], row["peak_extra_bytes"]
        lines.append(
            [
                row["name"],
                format_seconds(seconds["median"]) if seconds else "-",
                f"({format_seconds(seconds['low'])} - {format_seconds(seconds['high'])})" if seconds else "",
                f"{row['ratio_to_floor']:.2f}" if row["ratio_to_floor"] is not None else "-",
                format_bytes(memory) if memory is not None else "-",
                *(format_error(row["error"].get(name)) for name in ("loss", "grad_hidden")),
                row["skipped"] or row["setting"],
            ]
        )
    header = ["provider", "median", "(low - high)", "x floor", "peak extra", "err loss", "err grad_hidden", "setting"]
    title = (
        f"SimPO on {comparison['pairs']} pairs of {comparison['T']} tokens, {comparison['valid']:.0%} valid, "
        f"D={comparison['D']}, V={comparison['V']}, frozen head, {comparison['dtype']}"
    )
    ratio = comparison["ratio_to_liger"]
    verdict = "no ratio: one of the two did not run or was wrong"
    if ratio is not None:
        verdict = f"{OWN} over {PEER}: time {ratio['time']:.3f}x, peak extra memory {ratio['peak_extra']:.3f}x"
    return f"{title}\n{format_table(header, lines)}\n{verdict}\n"
