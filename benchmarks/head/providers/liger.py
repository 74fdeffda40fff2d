"""Liger's fused heads: linear cross entropy, scaled cross entropy (CuTe kernels on Hopper), and its chunked preference class."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import SEQUENCE_LENGTH, Inputs, Result
from benchmarks.head.providers.base import differentiated, need_cuda, on_valid_rows


def liger(inputs: Inputs, *, chunk_mem_const: int = 1) -> list[Step]:
    """Liger's fused linear cross entropy. With reduction="none" its backward recomputes the logits.

    accum_dtype is the dtype in which chunks add up the head's gradient: None is the head's dtype, float32 rounds once and moves
    twice the bytes. The fastest that is right competes. With a frozen head there is nothing to add up.
    """
    need_cuda(inputs, "Liger's fused linear cross entropy is a Triton kernel: it")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def step(accum_dtype: torch.dtype | None, how: str) -> Step:
        def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
            return -liger_fused_linear_cross_entropy(
                hidden,
                inputs.weight,
                labels,
                reduction="none",
                accum_dtype=accum_dtype,
                chunk_mem_const=chunk_mem_const,
            )

        setting = f"reduction='none', chunk_mem_const={chunk_mem_const}, given valid rows only, {how}"
        return differentiated(on_valid_rows(token_log_probs, inputs), inputs, setting)

    if inputs.head == "frozen" or inputs.mode == "no_grad":
        return [step(None, "accum_dtype=None (no head gradient to add up)")]
    half = inputs.weight.dtype != torch.float32
    return [step(torch.float32, "accum_dtype=float32"), *([step(None, "accum_dtype=None")] if half else [])]


def liger_wide(inputs: Inputs) -> list[Step]:
    """Liger's fused linear cross entropy with larger chunks: 8 times, as it sets them for GPT-OSS, or 32 times. More memory."""
    return [step for factor in (8, 32) for step in liger(inputs, chunk_mem_const=factor)]


def liger_scaled(inputs: Inputs) -> list[Step]:
    """Liger's fused linear scaled cross entropy, which returns the loss of every token.

    On Hopper it is a CuTe kernel: bf16 only, it needs nvidia-cutlass-dsl. Everywhere else, Blackwell included, it is plain torch
    in chunks of 512 rows, or the cuTile kernel where cuda-tile is installed. All recompute the logits in their backward and
    compute the head's gradient even if the head is frozen; they add it up in the head's dtype.
    """
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    # Its check of the labels waits for the GPU in every call. Ours are in range.
    os.environ["LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"] = "0"
    device = inputs.hidden.device
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    if hopper:
        if inputs.hidden.dtype != torch.bfloat16:
            raise Unavailable(f"its CuTe kernel takes bf16 only, not {inputs.hidden.dtype}")
        if importlib.util.find_spec("cutlass") is None:
            raise Unavailable("its CuTe kernel needs nvidia-cutlass-dsl: pip install 'liger-kernel[cutedsl]'")

    functions = {
        "CuTe kernel" if hopper else "plain torch, 512 rows at a time": LigerFusedLinearScaledCrossEntropyFunction
    }
    if device.type == "cuda":
        try:
            from liger_kernel.ops.cutile.ops.fused_linear_scaled_cross_entropy import (
                LigerFusedLinearScaledCrossEntropyFunction as CuTile,
            )
        except ImportError:
            pass  # cuda-tile is an extra of Liger's; the other function is measured
        else:
            functions["cuTile kernel"] = CuTile

    def step(function: Any, how: str) -> Step:
        def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
            return -function.apply(hidden, inputs.weight, labels)

        setting = f"LigerFusedLinearScaledCrossEntropyFunction ({how}), given valid rows only"
        return differentiated(on_valid_rows(token_log_probs, inputs), inputs, setting)

    return [step(function, how) for how, function in functions.items()]


def liger_preference(inputs: Inputs) -> Step:
    """Liger's chunked preference base class (plain PyTorch, any device) with a loss linear in the token log-probs.

    The class averages or sums log-probs over a sequence. With sequences of one token it returns token log-probs. A chunk of
    1024 + 1024 rows then costs as much as its DPO or SimPO loss on one pair of 1024 tokens. It cannot drop ignored rows.
    """
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    num_rows = inputs.labels.shape[0]
    if num_rows % 2:
        raise Unavailable(f"pairs need an even number of rows, not {num_rows}")

    class LinearLoss(LigerFusedLinearPreferenceBase):
        @staticmethod
        def preference_loss_fn(chosen: Tensor, rejected: Tensor, full_target: Tensor, beta: Tensor) -> Tensor:
            return (beta * torch.cat([chosen, rejected])).sum()

        @classmethod
        def forward(cls, ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> Any:
            return super().forward(
                cls=cls,
                ctx=ctx,
                _input=hidden.unsqueeze(1),
                weight=weight,
                target=labels.unsqueeze(1),
                beta=upstream,
                compute_nll_loss=False,
                average_log_prob=False,
                compiled=True,
                chunk_size=hidden.shape[0] // 2,
            )

        @staticmethod
        def backward(ctx: Any, *grad_output: Any) -> Any:
            grad_input, grad_weight = LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:2]
            return grad_input.squeeze(1), grad_weight, None, None

    chunk = 2 * SEQUENCE_LENGTH

    def run() -> Result:
        losses, log_probs = [], []
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            loss, (chosen, rejected, *_) = LinearLoss.apply(
                inputs.hidden[rows], inputs.weight, inputs.labels[rows], inputs.upstream[rows]
            )
            losses.append(loss)
            log_probs += [chosen.detach(), rejected.detach()]
        found = torch.cat(log_probs)
        if inputs.mode == "no_grad":
            return Result(found)
        wanted = [inputs.hidden] + ([inputs.weight] if inputs.head == "trainable" else [])
        return Result(found, *torch.autograd.grad(torch.stack(losses).sum(), wanted))

    def run_in_mode() -> Result:
        with torch.set_grad_enabled(inputs.mode == "train"):
            return run()

    return Step(
        run_in_mode, "chunked preference class, all rows, one pair of 1024-token answers per chunk, compiled=True"
    )
