"""Fused heads of Apple, TRL and QuACK, each called through its public interface with the best setting that its authors name.

A peer that would compute ignored rows too is given the valid rows only, to compare it at its best. For a peer that returns a
scalar loss, its per-token form is called. The step's setting says how.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from benchmarks.head.problem import IGNORE_INDEX, Inputs, Result
from benchmarks.head.providers.base import differentiated, need_cuda, on_valid_rows


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
    add_fused_lm_head(model, outputs=("log_probs",))

    def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
        answer = model(inputs_embeds=hidden[None], shift_labels=labels[None], fused_lm_head=True)
        return answer.log_probs[0]

    setting = "add_fused_lm_head(model, outputs=('log_probs',))"
    if inputs.hidden.device.type == "cuda":
        return differentiated(lambda: token_log_probs(inputs.hidden, inputs.labels), inputs, setting)
    # Without a GPU it scores every row.
    return differentiated(on_valid_rows(token_log_probs, inputs), inputs, f"{setting}, given valid rows only")


def quack(inputs: Inputs) -> Step | list[Step]:
    """QuACK's linear cross entropy, whose public losses are scalars.

    Frozen head: its scaled-exp forward returns the loss of every token and d loss_t / d hidden_t, so the upstream gradient
    is one factor per row and nothing is computed twice. Trainable head: that forward applies one scalar to dW, not one factor
    per token, so the per-token form is `linear_cross_entropy_func(reduction="none")`, which stores the logits. Forward only: the
    kernel of its own evaluation, which stores no exponentials, or the scaled-exp forward without gradients.
    """
    need_cuda(inputs, "QuACK")
    from quack import linear_cross_entropy as module

    weight, chunk_size = inputs.weight, 4096
    if inputs.head == "trainable" and inputs.mode == "train":

        def token_log_probs(hidden: Tensor, labels: Tensor) -> Tensor:
            return -module.linear_cross_entropy_func(
                hidden, weight, None, labels, ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=True
            )

        setting = "linear_cross_entropy_func, reduction='none', inplace_backward=True, given valid rows only"
        return differentiated(on_valid_rows(token_log_probs, inputs), inputs, setting)

    if not module.scaled_exp_lce_supported(inputs.hidden.detach(), weight, chunk_size, "sum"):
        raise Unavailable(f"its scaled-exp forward does not take {inputs.hidden.dtype}, V={weight.shape[0]}, this GPU")

    def scaled_exp() -> Result:
        mask = inputs.labels != IGNORE_INDEX
        need_dx = inputs.mode == "train"
        with torch.no_grad():
            hidden = inputs.hidden[mask]
            loss, dx, _ = module.scaled_exp_linear_cross_entropy_fwd(
                hidden, weight, inputs.labels[mask], chunk_size, need_dx=need_dx, need_dw=False
            )
            num_valid = hidden.shape[0]
            log_probs = torch.zeros_like(inputs.upstream).masked_scatter(mask, -loss[:num_valid])
            if not need_dx:
                return Result(log_probs)
            grad_hidden = torch.zeros_like(inputs.hidden)
            grad_hidden[mask] = dx[:num_valid] * -inputs.upstream[mask].to(dx.dtype).unsqueeze(1)
            return Result(log_probs, grad_hidden)

    step = Step(scaled_exp, "scaled_exp_linear_cross_entropy_fwd(chunk_size=4096), row-scaled, given valid rows only")
    if inputs.mode == "train":
        return step

    def evaluated(hidden: Tensor, labels: Tensor) -> Tensor:
        return -module._scaled_exp_lce_loss_only(hidden, weight, labels, IGNORE_INDEX)

    setting = "the per-token part of its evaluation, which stores no logits, given valid rows only"
    return [differentiated(on_valid_rows(evaluated, inputs), inputs, setting), step]
