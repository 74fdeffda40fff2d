"""KTO on hidden states and an LM head, as a module with the arguments of LigerFusedLinearKTOLoss.

The token log-probs come from fused_linear_logprobs, so no logits are stored; the loss is losses/kto.py. Liger's chunks of one
sequence at a time, its compilation and its copies of the weight gradient are not needed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.fused.settings import check_settings, shown
from synpo_fast.losses import LossOutput, PairLogprobs, kto
from synpo_fast.losses.checks import check_number
from synpo_fast.ops.linear_logprobs import fused_linear_logprobs

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class FusedLinearKTOLoss(nn.Module):
    """KTO (arXiv 2402.01306) of B responses with a label each, on hidden states and a head.

    Args:
        ignore_index: target entries that do not count (prompt, padding).
        beta: scale of the log-ratios to the reference.
        use_ref_model: with False the reference log-probs are 0, and a reference that is given is ignored, as in Liger.
        average_log_prob: use means over tokens instead of sums.
        compiled, chunk_size: tune Liger's implementation and have no effect here.
        desirable_weight, undesirable_weight: weights of the two labels; Liger has none.
        settings: logit_scale, softcap, keep_bytes and backend of fused_linear_logprobs.

    forward(_input, lin_weight, target, bias=None, preference_labels=None, ref_input=None, ref_weight=None, ref_bias=None,
    kl=None) takes _input [B, T, D], target [B, T] (already shifted) and preference_labels bool [B], True for a desirable
    response, and returns
        loss, (chosen_logps, rejected_logps, chosen_logits, rejected_logits, chosen_rewards, rejected_rewards)
    where the loss is the mean over responses, and everything in the tuple is a detached sum over the desirable or over the
    undesirable responses, as in Liger; the logits are summed over all positions and the vocabulary. `last_output` keeps the
    LossOutput with all metrics, detached.

    kl: KTO's reference point, a number or a tensor with one (see losses/kto.py); None is 0, as in Liger. Liger takes one per
    response, too, but adds the loss up once for each of them, so this is refused here. A response without any target has
    log-prob 0 and counts.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__()
        known = ("logit_scale", "softcap", "keep_bytes", "backend")
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"unknown argument {', '.join(unknown)}; expected one of {', '.join(known)}")
        check_settings(ignore_index=ignore_index, **settings)
        check_number("beta", beta, above=0.0)
        check_number("desirable_weight", desirable_weight, at_least=0.0)
        check_number("undesirable_weight", undesirable_weight, at_least=0.0)
        self.ignore_index, self.use_ref_model, self.average_log_prob = ignore_index, use_ref_model, average_log_prob
        self.options = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        self.settings = settings
        self.last_output: LossOutput | None = None

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | float | None = None,
    ) -> tuple[Tensor, Outputs]:
        labels, point = self._check(_input, target, preference_labels), _reference_point(kl, target.device)
        reference = torch.zeros(labels.shape[0], device=target.device)
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True needs ref_input and ref_weight")
            with torch.no_grad():
                reference = self._values(ref_input, ref_weight, target, ref_bias)
        policy = _rows(self._values(_input, lin_weight, target, bias), labels, point)
        output = kto(policy, _rows(reference, labels, point), **self.options)
        loss = output.losses.mean()
        self.last_output = LossOutput(**{**vars(output), "losses": output.losses.detach()})
        chosen, rejected = (_sum_of_logits(_input, lin_weight, bias, mask) for mask in (labels, ~labels))
        return loss, (
            output.chosen_logps.sum(), output.rejected_logps.sum(), chosen, rejected,
            output.chosen_rewards.sum(), output.rejected_rewards.sum(),
        )  # fmt: skip

    def _values(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        """The sum or the mean of each response's log-probs, [B]."""
        logps = fused_linear_logprobs(
            hidden, weight, target, bias=bias, ignore_index=self.ignore_index, **self.settings
        )
        sums = logps.sum(1)
        return sums / (target != self.ignore_index).sum(1).clamp(min=1) if self.average_log_prob else sums

    def _check(self, hidden: Tensor, target: Tensor, labels: Tensor | None) -> Tensor:
        if hidden.dim() != 3 or hidden.shape[0] == 0 or target.shape != hidden.shape[:2]:
            raise ValueError(
                f"_input must be [B, T, D] and target [B, T], got {list(hidden.shape)} and {list(target.shape)}"
            )
        if not isinstance(labels, Tensor) or labels.dtype != torch.bool or labels.shape != target.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
            raise ValueError(
                f"preference_labels must be bool [{target.shape[0]}], a tensor with one value for each response, got {got}"
            )
        return labels

    def extra_repr(self) -> str:
        more = {"use_ref_model": self.use_ref_model, "average_log_prob": self.average_log_prob}
        return shown({**self.options, **more, "ignore_index": self.ignore_index, **self.settings})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_output": None}


def _reference_point(kl: Tensor | float | None, device: torch.device) -> Tensor:
    """KTO's reference point as a scalar tensor without gradient."""
    if isinstance(kl, Tensor):
        if kl.numel() != 1:
            raise ValueError(f"kl must be one number, the mean over the batch, got {list(kl.shape)}")
        return kl.detach().reshape(()).to(device)
    if kl is None:
        return torch.zeros((), device=device)
    check_number("kl", kl)
    return torch.full((), float(kl), device=device)


def _rows(values: Tensor, labels: Tensor, kl: Tensor) -> PairLogprobs:
    """One row for each response: its value, as if it were a response of one token."""
    both, mask = torch.cat([values, values])[:, None], torch.cat([labels, ~labels])[:, None]
    return PairLogprobs.from_padded(both, mask, unpaired=torch.ones_like(labels), kl=kl)


@torch.no_grad()
def _sum_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The sum of the raw logits of the masked responses, over all positions and the vocabulary, without logits."""
    row = torch.where(mask[:, None], hidden.sum(1, dtype=torch.float32), 0.0).sum(0)
    total = weight.new_zeros(weight.shape[1], dtype=torch.float32)
    for part in weight.split(4096):  # in parts, because the sum copies its input to fp32
        total += part.sum(0, dtype=torch.float32)
    shift = 0.0 if bias is None else bias.sum(dtype=torch.float32) * mask.sum() * hidden.shape[1]
    return row @ total + shift
