"""Cross entropy on hidden states and a head, for supervised training, without storing the logits.

    L_t = -lp_t + label_smoothing * (lp_t - mean_v log p_t(v)) + lse_square_scale * logsumexp_t^2

The constructor's arguments and the call are those of LigerFusedLinearCrossEntropyLoss, in its order. It costs 4*N*D*V
for N valid tokens with a frozen head and 6*N*D*V with a trained one. Liger's module needs a GPU; this one runs anywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synpo_fast.fused.settings import check_settings, shown
from synpo_fast.losses.nll import TokenPenalties, token_penalties
from synpo_fast.ops.linear_logprobs import fused_linear_outputs

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True, eq=False)
class CrossEntropyOutput:
    """The loss, and what was asked for beside it, detached: the z-loss in it, and the share of tokens that are the first choice.

    With reduction "none" each has one value per position."""

    loss: Tensor
    z_loss: Tensor | None
    token_accuracy: Tensor | None


class FusedLinearCrossEntropyLoss(nn.Module):
    """Cross entropy of targets under a linear head, with label smoothing and z-loss.

    Args:
        ce_weight, use_token_scaling, return_predicted_tokens: Liger's; only their defaults are accepted.
        accum_dtype: Liger's; has no effect, because sums are in fp32 whatever it is.
        ignore_index: targets that do not count.
        lse_square_scale: weight of the squared logsumexp (z-loss).
        label_smoothing: share of each target that lies on all words alike; not with a softcap.
        reduction: "mean" over the valid tokens, "sum" or "none".
        softcap, logit_scale, keep_bytes, backend: as in fused_linear_logprobs.
        return_z_loss, return_token_accuracy: return a CrossEntropyOutput in place of the loss.

    forward(lin_weight, _input, target, bias=None) takes _input [..., D] and target [...], already shifted. Without a valid target
    the mean is 0.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        logit_scale: float = 1.0,
        keep_bytes: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_not_given(ce_weight, use_token_scaling, return_predicted_tokens)
        self.penalties = TokenPenalties(label_smoothing, lse_square_scale)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if label_smoothing and softcap is not None:
            raise ValueError(f"label_smoothing={label_smoothing} is not possible with softcap={softcap}")
        check_settings(logit_scale, softcap, ignore_index, keep_bytes, backend)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.softcap, self.logit_scale = softcap, logit_scale
        self.return_z_loss, self.return_token_accuracy = return_z_loss, return_token_accuracy
        self.keep_bytes, self.backend = keep_bytes, backend

    def extra_repr(self) -> str:
        own = {"label_smoothing": self.penalties.label_smoothing, "lse_square_scale": self.penalties.z_loss}
        names = (
            "reduction", "return_z_loss", "return_token_accuracy",
            "ignore_index", "logit_scale", "softcap", "keep_bytes", "backend",
        )  # fmt: skip
        return shown({**own, **{name: getattr(self, name) for name in names}})

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        tokens = fused_linear_outputs(
            _input, lin_weight, target, bias=bias, logit_scale=self.logit_scale, softcap=self.softcap,
            ignore_index=self.ignore_index, keep_bytes=self.keep_bytes, backend=self.backend,
            logsumexp_grad=self.penalties.needs_logsumexp,
            with_mean_logits=self.penalties.label_smoothing > 0,
        )  # fmt: skip
        added = token_penalties(tokens.logps, tokens.logsumexp, tokens.mean_logits, self.penalties)
        num_valid = (target != self.ignore_index).sum().clamp(min=1)
        loss = self._reduced(added - tokens.logps, num_valid)
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        with torch.no_grad():
            z_loss = self._reduced(self.penalties.z_loss * tokens.logsumexp.square(), num_valid)
            hits = tokens.is_top1.to(tokens.logps.dtype)
            accuracy = hits if self.reduction == "none" else hits.sum() / num_valid
        return CrossEntropyOutput(
            loss, z_loss if self.return_z_loss else None, accuracy if self.return_token_accuracy else None
        )

    def _reduced(self, values: Tensor, num_valid: Tensor) -> Tensor:
        if self.reduction == "none":
            return values
        return values.sum() / num_valid if self.reduction == "mean" else values.sum()


def _check_not_given(ce_weight: Tensor | None, use_token_scaling: bool, return_predicted_tokens: bool) -> None:
    """Raises ValueError for what Liger's class can do and this one cannot."""
    if ce_weight is not None:
        got = f"a tensor {list(ce_weight.shape)}" if isinstance(ce_weight, Tensor) else repr(ce_weight)
        raise ValueError(
            f"ce_weight must be None, got {got}: class weights are not supported "
            "(it is the first argument, as in Liger; ignore_index is the second)"
        )
    if use_token_scaling:
        raise ValueError(
            "use_token_scaling must be False: for a loss of your own over token log-probs use fused_linear_logprobs"
        )
    if return_predicted_tokens:
        raise ValueError(
            "return_predicted_tokens must be False: only whether the target is the first choice is known "
            "(return_token_accuracy)"
        )
