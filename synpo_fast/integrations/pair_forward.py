"""Adds model(..., pair_labels=labels): hidden states, head and pair loss in one forward, without logits.

The loss is computed inside the model's forward and not from its outputs, because only there DDP, FSDP and DeepSpeed have
gathered the head's weight and track the gradients of all parameters involved.
"""

from __future__ import annotations

import functools
import types
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.fused import FusedLinearPreferenceLoss
from synpo_fast.models.head import base_model_of, check_head, head_of, hidden_states

IGNORE_INDEX = -100


def add_pair_loss(model: nn.Module, loss: str = "synpo", **options: Any) -> FusedLinearPreferenceLoss:
    """Adds the argument pair_labels to `model` (a transformers model, plain or wrapped by peft). Returns the loss module.

    model(**inputs, pair_labels=labels), with inputs of 2B rows, the chosen half first, and labels [2B, T] as for a causal
    language model (not shifted, -100 on prompt and padding), returns a dict:
        loss: the mean over the B pairs, with autograd.
        chosen_logps, rejected_logps: [B], means or sums, whichever the loss uses.
        chosen_rewards, rejected_rewards: [B], detached.
        chosen_tokens, rejected_tokens: [B], counts.
        top1_tokens: how many chosen tokens are the model's first choice. entropies: summed over the tokens of all responses.
        chosen_logits, rejected_logits: [B], mean logit over a response's tokens and the vocabulary; absent with a softcap.

    Without pair_labels the model's forward is unchanged. The module's last_output has all metrics of the last call.

    loss and options are those of FusedLinearPreferenceLoss; a loss that needs a reference is refused.
    Raises ValueError where head_of does, and for a model whose logits differ from hidden states x head.
    """
    head, base = head_of(model), base_model_of(model)
    module = FusedLinearPreferenceLoss(loss, logit_scale=head.logit_scale, softcap=head.softcap, **options)
    if module.needs_reference:
        raise ValueError(f"loss {loss!r} needs reference log-probs, which this forward does not compute")
    if head.weight.numel() > 0:
        check_head(model)
    else:
        warnings.warn(
            f"{type(base).__name__}'s head is a ZeRO-3 shard, so it was not compared with the model's own logits; "
            "call check_head where the whole weight is available",
            stacklevel=2,
        )
    replaced = base.__dict__.get("forward")

    @functools.wraps(type(base).forward)  # generate and Trainer read the signature
    def forward(self: Any, *args: Any, pair_labels: Tensor | None = None, **kwargs: Any) -> Any:
        if pair_labels is None:
            return type(self).forward(self, *args, **kwargs) if replaced is None else replaced(*args, **kwargs)
        return _pair_outputs(self, module, pair_labels, _inputs(args, kwargs))

    base.forward = types.MethodType(forward, base)
    return module


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword inputs of the backbone, without those that only a head reads."""
    if args:
        raise ValueError(f"pair_labels goes with keyword inputs only, got {len(args)} positional ones")
    if kwargs.get("labels") is not None:
        raise ValueError("give labels or pair_labels, not both")
    return {name: value for name, value in kwargs.items() if name not in ("labels", "num_items_in_batch")}


def _pair_outputs(
    base: Any, module: FusedLinearPreferenceLoss, pair_labels: Tensor, inputs: dict[str, Any]
) -> dict[str, Tensor]:
    hidden, head = hidden_states(base, **inputs), head_of(base)
    if hidden.shape[:2] != pair_labels.shape:
        raise ValueError(f"pair_labels is {list(pair_labels.shape)}, the hidden states {list(hidden.shape)}")
    hidden = hidden.to(head.weight.device)  # a model split by device_map may end on another device
    target = nn.functional.pad(pair_labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(hidden.device)
    loss, aux = module(head.weight, hidden, target, head.bias)
    chosen_logps, rejected_logps, _, _, _, chosen_rewards, rejected_rewards = aux
    mask = target != IGNORE_INDEX
    chosen_tokens, rejected_tokens = mask.sum(1).chunk(2)
    outputs = {
        "loss": loss,
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }
    if module.last_tokens is not None:
        outputs["top1_tokens"] = module.last_tokens.is_top1.chunk(2)[0].sum()
        outputs["entropies"] = module.last_tokens.entropy.sum()
    if head.softcap is None:
        outputs["chosen_logits"], outputs["rejected_logits"] = _response_logits(
            hidden, module.mean_weight_row(head.weight), head.bias, mask, head.logit_scale
        ).chunk(2)
    return outputs


@torch.no_grad()
def _response_logits(hidden: Tensor, mean_row: Tensor, bias: Tensor | None, mask: Tensor, logit_scale: float) -> Tensor:
    """Mean logit over a response's tokens and the vocabulary, [2B], computed with mean_row [D], the mean of W's rows."""
    means = (hidden @ mean_row.to(hidden.dtype)).float()
    if bias is not None:
        means = means + bias.mean(dtype=torch.float32)
    return logit_scale * torch.where(mask, means, 0.0).sum(1) / mask.sum(1).clamp(min=1)
