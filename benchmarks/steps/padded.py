"""Variants that run transformers' own forward on padded rows: Liger's DPO, SynPO as released, and the first changes one after
another, from TRL's step to this package's head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Unavailable
from benchmarks.steps.step_variant import (
    DPO_BETA,
    Forward,
    Scores,
    peer_attention,
    use_attention,
)
from benchmarks.steps.trl_trainers import dpo_trainer
from benchmarks.steps.workload import IGNORE_INDEX, Workload, labels_of, model_inputs, padded_batch
from synpo_fast.losses import PairLogprobs, synpo
from synpo_fast.models.head import head_of, hidden_states
from synpo_fast.ops.linear_logprobs import fused_linear_logprobs


def liger_dpo(workload: Workload) -> Forward:
    """Liger's chunked DPO loss on the hidden states of all rows, of policy and reference (the adapter switched off)."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=DPO_BETA, compiled=True)
    model: Any = workload.policy.model
    inputs, target = model_inputs(workload.batch), labels_of(workload.batch)[:, 1:].contiguous()
    attention = peer_attention(workload)

    def loss(scores: Scores) -> Tensor:
        use_attention(workload, attention)
        hidden = hidden_states(model, **inputs, use_cache=False)[:, :-1]
        with torch.no_grad(), model.disable_adapter():
            reference = hidden_states(model, **inputs, use_cache=False)[:, :-1]
        weight = head_of(model).weight
        value, (chosen, rejected, *_) = module(weight, hidden, target, ref_input=reference, ref_weight=weight)
        scores.sums = torch.cat([chosen, rejected]).detach()
        return value

    return Forward(loss, f"LigerFusedLinearDPOLoss(compiled=True), reference: adapter switched off; {attention}")


def released(workload: Workload) -> Forward:
    """SynPO as in its authors' code: chosen and rejected run apart, each with the video; fp32 log-softmax of all rows' logits."""
    model: Any = workload.policy.model
    halves = [
        {name: tensor.to(workload.device) for name, tensor in batch.items()}
        for batch in (padded_batch(workload.policy, workload.samples, (which,)) for which in range(2))
    ]
    attention = peer_attention(workload)

    def loss(scores: Scores) -> Tensor:
        use_attention(workload, attention)
        found: list[tuple[Tensor, Tensor]] = []
        terms: list[tuple[Tensor, Tensor]] = []
        for batch in halves:
            logits = model(**model_inputs(batch), use_cache=False).logits[:, :-1].float()
            labels, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
            log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            found.append((log_probs.detach(), mask))
            geometric = ((log_probs * mask).sum(1) / mask.sum(1)).exp()
            terms.append((geometric, (log_probs.exp() * mask).sum(1) / mask.sum(1)))
        scores.padded = _stacked(found)
        (chosen, likelihood), (rejected, _) = terms
        return (-torch.sigmoid(30.0 * (chosen - rejected)) - 0.2 * likelihood).mean()

    return Forward(loss, f"model(...).logits.float() for chosen, then for rejected; {attention}")


def _stacked(halves: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Pads log-probs and masks of both halves to the same length and concatenates them."""
    length = max(mask.shape[1] for _, mask in halves)
    pad = torch.nn.functional.pad
    padded = [[pad(tensor, (0, length - tensor.shape[1])) for tensor in half] for half in halves]
    return torch.cat([half[0] for half in padded]), torch.cat([half[1] for half in padded])


def no_reference(workload: Workload) -> Forward:
    """SynPO with TRL's forward of the policy, as DPOTrainer calls it, and without the reference's."""
    model, inputs, labels = dpo_trainer(workload).model, model_inputs(workload.batch), labels_of(workload.batch)
    mask, attention = labels[:, 1:] != IGNORE_INDEX, peer_attention(workload)

    def loss(scores: Scores) -> Tensor:
        use_attention(workload, attention)
        log_probs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        return _synpo(log_probs, mask, scores)

    return Forward(loss, f"TRL's model call without the reference's, then synpo; {attention}")


def fused_head_all_rows(workload: Workload) -> Forward:
    if workload.device.type == "cuda":
        raise Unavailable("on a GPU TRL's head scores response tokens only, which is synpo-valid-rows")
    return _fused_head(workload, valid_only=False)


def fused_head_valid_rows(workload: Workload) -> Forward:
    return _fused_head(workload, valid_only=True)


def _fused_head(workload: Workload, *, valid_only: bool) -> Forward:
    inputs, labels = model_inputs(workload.batch), labels_of(workload.batch)[:, 1:]
    mask, attention = labels != IGNORE_INDEX, peer_attention(workload)
    targets = (labels if valid_only else workload.batch["input_ids"][:, 1:]).contiguous()

    def loss(scores: Scores) -> Tensor:
        use_attention(workload, attention)
        hidden = hidden_states(workload.policy.model, **inputs, use_cache=False)[:, :-1]
        head = head_of(workload.policy.model)
        return _synpo(fused_linear_logprobs(hidden, head.weight, targets, bias=head.bias), mask, scores)

    which = "rows that predict a response token" if valid_only else "every row"
    return Forward(loss, f"transformers' forward, fused_linear_logprobs on {which}; {attention}")


def _synpo(log_probs: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    scores.padded = (log_probs.detach(), mask)
    return synpo(PairLogprobs.from_padded(log_probs, mask)).losses.mean()
