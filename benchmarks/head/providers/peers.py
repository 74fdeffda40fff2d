"""Fused heads of other packages, each called through its public interface with the best setting that its documentation names.

A peer that would compute ignored rows too is given the valid rows only, to compare it at its best. For a peer that returns a
scalar loss, its per-token form is called. The step's setting says how.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import IGNORE_INDEX, SEQUENCE_LENGTH, Inputs, Result
from benchmarks.head.providers.base import differentiated, need_cuda, on_valid_rows


def liger(inputs: Inputs, *, chunk_mem_const: int = 1) -> Step:
    """Liger's fused linear cross entropy. With reduction="none" its backward recomputes the logits."""
    need_cuda(inputs, "Liger's fused linear cross entropy is a Triton kernel: it")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    accum_dtype = torch.float32 if inputs.head == "trainable" else None

    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(
            hidden, inputs.weight, labels, reduction="none", accum_dtype=accum_dtype, chunk_mem_const=chunk_mem_const
        )

    setting = f"reduction='none', chunk_mem_const={chunk_mem_const}, given valid rows only"
    if accum_dtype is not None:
        setting += ", accum_dtype=float32"
    return differentiated(on_valid_rows(token_log_probs, inputs), inputs, setting)


def liger_wide(inputs: Inputs) -> Step:
    """Liger's fused linear cross entropy with chunks eight times as large, as it sets them for GPT-OSS: faster, more memory."""
    return liger(inputs, chunk_mem_const=8)


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


def cut_cross_entropy(inputs: Inputs, *, filter_eps: str | None = "high") -> Step:
    """Apple's cut-cross-entropy. By default its backward skips blocks with small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    on_gpu = inputs.hidden.device.type == "cuda"
    if not on_gpu and filter_eps is None:
        raise Unavailable("the exact mode is a setting of its Triton kernel, which needs a GPU")
    impl = "cce" if on_gpu else "torch_compile"

    def forward() -> Tensor:
        return -linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.labels,
            ignore_index=IGNORE_INDEX,
            reduction="none",
            filter_eps=filter_eps,
            impl=impl,
        )

    setting = f"reduction='none', impl={impl!r}"
    return differentiated(forward, inputs, f"{setting}, filter_eps={filter_eps!r}" if on_gpu else setting)


def cut_cross_entropy_exact(inputs: Inputs) -> Step:
    """Apple's cut-cross-entropy with the gradient filter off, so that its gradients are exact."""
    return cut_cross_entropy(inputs, filter_eps=None)


class _HeadOnly(torch.nn.Module):
    """A minimal model that TRL's `add_fused_lm_head` can patch. Its backbone returns the hidden states it is given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.head = SimpleNamespace(weight=weight, bias=None)

    def base_model(self, *, inputs_embeds: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=inputs_embeds)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self, inputs_embeds: Tensor) -> Any:
        raise NotImplementedError("only the fused head is called")


def trl_fused_head(inputs: Inputs) -> Step:
    """TRL's fused head, called as its trainers call it: model(..., shift_labels=..., fused_lm_head=True).log_probs."""
    from trl.trainer.utils import add_fused_lm_head

    model: Any = _HeadOnly(inputs.weight)
    add_fused_lm_head(model)

    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        answer = model(inputs_embeds=hidden[None], shift_labels=labels[None], fused_lm_head=True)
        return answer.log_probs[0]

    setting = "add_fused_lm_head(model), log_probs only"
    if inputs.hidden.device.type == "cuda":
        return differentiated(lambda: token_log_probs(inputs.hidden, inputs.labels), inputs, setting)
    # Without a GPU it scores every row.
    return differentiated(on_valid_rows(token_log_probs, inputs), inputs, f"{setting}, given valid rows only")


def quack(inputs: Inputs) -> Step:
    """QuACK's linear cross entropy, whose public losses are scalars.

    Frozen head: its scaled-exp forward returns the loss of every token and d loss_t / d hidden_t, so the upstream gradient
    is one factor per row and nothing is computed twice. Trainable head: that forward applies one scalar to dW, not one factor
    per token, so the per-token form is `linear_cross_entropy_func(reduction="none")`, which stores the logits.
    """
    need_cuda(inputs, "QuACK")
    from quack.linear_cross_entropy import (
        linear_cross_entropy_func,
        scaled_exp_lce_supported,
        scaled_exp_linear_cross_entropy_fwd,
    )

    weight, chunk_size = inputs.weight, 4096
    if inputs.head == "trainable" and inputs.mode == "train":

        def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
            return -linear_cross_entropy_func(
                hidden, weight, None, labels, ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=True
            )

        setting = "linear_cross_entropy_func, reduction='none', inplace_backward=True, given valid rows only"
        return differentiated(on_valid_rows(token_log_probs, inputs), inputs, setting)

    if not scaled_exp_lce_supported(inputs.hidden.detach(), weight, chunk_size, "sum"):
        raise Unavailable(f"its scaled-exp forward does not take {inputs.hidden.dtype}, V={weight.shape[0]}, this GPU")

    def run() -> Result:
        mask = inputs.labels != IGNORE_INDEX
        need_dx = inputs.mode == "train"
        with torch.no_grad():
            hidden = inputs.hidden[mask]
            loss, dx, _ = scaled_exp_linear_cross_entropy_fwd(
                hidden, weight, inputs.labels[mask], chunk_size, need_dx=need_dx, need_dw=False
            )
            num_valid = hidden.shape[0]
            log_probs = torch.zeros_like(inputs.upstream).masked_scatter(mask, -loss[:num_valid])
            if not need_dx:
                return Result(log_probs)
            grad_hidden = torch.zeros_like(inputs.hidden)
            grad_hidden[mask] = dx[:num_valid] * -inputs.upstream[mask].to(dx.dtype).unsqueeze(1)
            return Result(log_probs, grad_hidden)

    return Step(run, "scaled_exp_linear_cross_entropy_fwd(chunk_size=4096), row-scaled, given valid rows only")
