"""Preference losses on hidden states: LM head, token log-probs and loss in one module, without storing the logits.

The calling convention is Liger's: forward(lin_weight, _input, target, bias=None) with _input [2B, T, D], the chosen half first,
and target [2B, T] already shifted. A user of Liger's classes only changes the import.

The module calls the op and then the loss; autograd does the rest. For N valid tokens this costs 4*N*D*V with a frozen head (LoRA)
and 6*N*D*V with a trained one, as long as the exponentials of its logits fit keep_bytes (see fused_linear_logprobs).
"""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synpo_fast.fused.settings import check_settings, shown
from synpo_fast.losses import LOSSES, AuxiliaryNLL, LossOutput, PairLogprobs, preference_loss, spec_of
from synpo_fast.losses.spec import LossSpec
from synpo_fast.losses.weighted_sum import SFT, canonical_name
from synpo_fast.ops.linear_logprobs import (
    TokenOutputs,
    fused_linear_logprobs,
    fused_linear_outputs,
    mean_row,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
NEEDS_TOKENS = ("synpo", "synpo_ref", "ipo", "sigmoid_norm")  # read more of a response than its summed log-prob


class FusedLinearPreferenceLoss(nn.Module):
    """Computes any loss of synpo_fast.losses from hidden states and a head.

    Args:
        loss: a key of LOSSES, or a weighted sum such as "dpo,bco_pair,sft" with the option loss_weights; `options` are its
            options, checked here. kto is a class of its own (FusedLinearKTOLoss), and so is sft (FusedLinearCrossEntropyLoss).
        ignore_index: target entries that do not count (prompt, padding).
        auxiliary: an NLL term on the chosen response, added to the loss.
        average_log_prob: losses that use sums use means instead (each response's log-probs are divided by its length). Not for
            losses with an NLL of their own.
        logit_scale, softcap: as in fused_linear_logprobs.
        keep_bytes, backend: as in fused_linear_logprobs.
        like_liger: treat a response without any target, nll_loss and an unneeded reference as Liger does; see below.

    forward(lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None) returns
        loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards)
    where everything in the tuple is detached. chosen_logps and rejected_logps [B] are the sums or means that the loss uses.
    The logit means are over all positions and the whole vocabulary, as in Liger. `last_output` keeps the LossOutput with all
    metrics, `last_tokens` the TokenOutputs [2B, T] of the policy (entropy, is_top1, ...), both detached.

    A response whose targets are all ignored raises ValueError on a CPU; on a GPU its pair has loss 0 and is counted in
    empty_pairs. With like_liger it has log-prob 0 and its pair counts, except in losses with an NLL of their own. nll_loss is the
    NLL per chosen token; with like_liger it is 0 unless it is part of the loss. A reference that the loss does not read raises
    ValueError; with like_liger a loss whose reference is switched off (reference_free) ignores it.
    """

    def __init__(
        self,
        loss: str = "synpo",
        *,
        ignore_index: int = -100,
        auxiliary: AuxiliaryNLL | None = None,
        average_log_prob: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        keep_bytes: int | None = None,
        backend: str | None = None,
        like_liger: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss, self.spec = canonical_name(loss), _spec_of(loss)
        unknown = sorted(set(options) - set(self.spec.options))
        if unknown:
            raise ValueError(f"loss {loss!r} has no option {', '.join(unknown)}; it has {', '.join(self.spec.options)}")
        if auxiliary is not None and auxiliary.target != "chosen":
            raise ValueError(
                f"auxiliary target {auxiliary.target!r} needs rows of its own; this module supports only 'chosen'"
            )
        if average_log_prob and self.spec.has_nll:
            raise ValueError(f"average_log_prob is not possible with {loss!r}, because its NLL is part of the loss")
        members = self.loss.split(",")
        # In a sum an option that was not given has each member's own default.
        self.options = options if len(members) > 1 else {**self.spec.options, **options}
        if average_log_prob and (self._needs_tokens() or any(LOSSES[each].reads == "mean" for each in members)):
            raise ValueError(
                f"average_log_prob is for losses that use sums; {loss!r} with these options already uses means"
            )
        check_settings(logit_scale, softcap, ignore_index, keep_bytes, backend)
        self.ignore_index, self.auxiliary, self.average_log_prob = ignore_index, auxiliary, average_log_prob
        self.logit_scale, self.softcap, self.keep_bytes, self.backend = logit_scale, softcap, keep_bytes, backend
        self.like_liger = like_liger
        self.last_output: LossOutput | None = None
        self.last_tokens: TokenOutputs | None = None
        self._mean_row: tuple[Any, int, Tensor] | None = None
        # The losses check their own options: a run on one pair with one token each shows a mistake here, not in the first step.
        one = torch.zeros(2, 1)
        self.loss_of_logps(one, torch.zeros(2, 1).long() + (ignore_index == 0), one if self.needs_reference else None)

    def extra_repr(self) -> str:
        more = {"auxiliary": self.auxiliary, "average_log_prob": self.average_log_prob, "like_liger": self.like_liger}
        return f"{self.loss!r}, {shown({**self.options, **more, **self._of_the_op()})}"

    @property
    def needs_reference(self) -> bool:
        return self.spec.reads_reference(self.options)

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, Outputs]:
        self._check(_input, target, ref_input, ref_weight, ref_bias)
        reference = self._reference_logps(target, ref_input, ref_weight, ref_bias) if self.needs_reference else None
        tokens = fused_linear_outputs(_input, lin_weight, target, bias=bias, logsumexp_grad=False, **self._of_the_op())
        output = self.loss_of_logps(tokens.logps, target, reference)
        loss = output.losses.mean()
        self.last_tokens = tokens.detach()
        self.last_output = replace(output, losses=output.losses.detach())
        chosen_mean, rejected_mean = self._logit_means(lin_weight, _input, bias)
        nll = output.metrics["nll_loss"]
        if self.like_liger and self.auxiliary is None and not self.spec.has_nll:
            nll = torch.zeros_like(nll)
        return loss, (
            output.chosen_logps, output.rejected_logps, chosen_mean, rejected_mean, nll,
            output.chosen_rewards, output.rejected_rewards,
        )  # fmt: skip

    def loss_of_logps(self, logps: Tensor, target: Tensor, reference: Tensor | None = None) -> LossOutput:
        """Computes the loss per pair from token log-probs [2B, T] (0 where ignored), with autograd."""
        mask = target != self.ignore_index
        if self.average_log_prob or self._reads_one_value():
            return self._on_values(logps, mask, reference)
        policy = PairLogprobs.from_padded(logps, mask)
        ref = None if reference is None else PairLogprobs.from_padded(reference, mask)
        return preference_loss(self.loss, policy, ref, auxiliary=self.auxiliary, **self.options)

    def _reads_one_value(self) -> bool:
        """True for a loss of Liger's, which reads one number of each response: a sum or a mean of log-probs."""
        of_liger = self.like_liger and "," not in self.loss and not self.spec.has_nll
        return of_liger and not self._needs_tokens() and self.options.get("ld_alpha", 1.0) == 1.0

    def _needs_tokens(self) -> bool:
        """True for a loss that a sum or a mean of log-probs does not determine."""
        return self.options.get("variant") == "ipo" or any(each in NEEDS_TOKENS for each in self.loss.split(","))

    def _on_values(self, logps: Tensor, mask: Tensor, reference: Tensor | None) -> LossOutput:
        """Computes the loss of one value of each response: the sum or mean of its log-probs, 0 if it has no target.

        The NLL reads the log-probs themselves."""
        averaged = self.average_log_prob or self.spec.reads == "mean"
        lengths = mask.sum(1)

        def values(logps: Tensor) -> PairLogprobs:
            sums = torch.where(mask, logps, 0.0).sum(1)
            return PairLogprobs.from_sums(*(sums / lengths.clamp(min=1) if averaged else sums).chunk(2))

        output = preference_loss(
            self.loss, values(logps), None if reference is None else values(reference), **self.options
        )
        num_pairs = lengths.shape[0] // 2
        chosen = -torch.where(mask, logps, 0.0)[:num_pairs].sum(1)
        per_token = chosen.sum() / lengths[:num_pairs].sum().clamp(min=1)
        losses = output.losses
        if self.auxiliary is not None:
            reduced = {
                "batch_token_mean": per_token,
                "token_mean": chosen / lengths[:num_pairs].clamp(min=1),
                "sum": chosen,
            }[self.auxiliary.reduce]
            losses = losses + self.auxiliary.weight * reduced
        return replace(output, losses=losses, metrics={**output.metrics, "nll_loss": per_token.detach()})

    def _of_the_op(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "ignore_index": self.ignore_index,
            "keep_bytes": self.keep_bytes,
            "backend": self.backend,
        }

    @torch.no_grad()
    def _reference_logps(
        self, target: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
    ) -> Tensor:
        if ref_input is None or ref_weight is None:
            free = ", or reference_free=True" if "reference_free" in self.options else ""
            raise ValueError(f"loss {self.loss!r} needs ref_input and ref_weight{free}")
        return fused_linear_logprobs(ref_input, ref_weight, target, bias=ref_bias, **self._of_the_op())

    def _check(self, hidden: Tensor, target: Tensor, *reference: Tensor | None) -> None:
        if hidden.dim() != 3 or hidden.shape[0] % 2 or hidden.shape[0] == 0:
            raise ValueError(f"_input must be [2B, T, D], chosen half first, got {list(hidden.shape)}")
        if target.shape != hidden.shape[:2]:
            raise ValueError(f"target must be {list(hidden.shape[:2])} like _input, got {list(target.shape)}")
        ignored = self.like_liger and self.spec.needs_reference
        if not self.needs_reference and not ignored and any(each is not None for each in reference):
            raise ValueError(f"loss {self.loss!r} with these options uses no reference, but one was given")

    @torch.no_grad()
    def _logit_means(self, weight: Tensor, hidden: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean raw logit over all positions and the vocabulary, computed as mean hidden row x mean row of W, without logits."""
        mean_row = self.mean_weight_row(weight)
        chosen, rejected = (half.mean((0, 1), dtype=torch.float32) @ mean_row for half in hidden.chunk(2))
        shift = 0.0 if bias is None else bias.mean(dtype=torch.float32)
        return chosen + shift, rejected + shift

    def mean_weight_row(self, weight: Tensor) -> Tensor:
        """Mean row [D] of the weight, in fp32. Cached while the same frozen tensor is passed; a change through `.data` is missed,
        and only the logit means would then be wrong."""
        if self._mean_row is not None and not weight.requires_grad:
            tensor, version, mean = self._mean_row
            if tensor() is weight and version == weight._version:
                return mean
        mean = mean_row(weight)
        self._mean_row = (weakref.ref(weight), weight._version, mean)
        return mean

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mean_row": None, "last_output": None, "last_tokens": None}


def _spec_of(loss: str) -> LossSpec:
    """The description of a loss or of a sum. Raises ValueError for those that have a class of their own."""
    if canonical_name(loss) == SFT:
        raise ValueError("loss 'sft' alone compares no pairs: use FusedLinearCrossEntropyLoss")
    spec = spec_of(loss)
    if spec.needs_kl:
        raise ValueError(
            f"loss {loss!r} needs KTO's reference point and a label for each response: use FusedLinearKTOLoss for kto"
        )
    return spec
