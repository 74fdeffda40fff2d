"""Input and output of a preference loss.

The input `PairLogprobs` holds the token log-probs of P pairs, ragged and flat. The output `LossOutput` holds one loss per pair
with autograd, detached rewards, and metrics under TRL's names.

A row may also be one labelled response instead of a pair (`unpaired`), for the losses that read each response by itself (kto).

All rows take part in the preference term (`compared_pairs`) except:
- a pair with `preference` False ("sft" rows of a manifest): its preference loss and rewards are 0;
- a pair with an empty response. On the CPU such a pair raises ValueError when the `PairLogprobs` is created. On a GPU that check
  would need a device sync, so the pair contributes 0 and the metric empty_pairs counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synpo_fast.losses.segments import segment_lengths, segment_sum, upcast
from synpo_fast.ops.host_copy import to_device


@dataclass(frozen=True, eq=False)
class PairLogprobs:
    """Token log-probs of P pairs. Response i of `chosen` is chosen[chosen_offsets[i] : chosen_offsets[i + 1]].

    chosen [Nc], rejected [Nr]: floating point. 16-bit values are converted to fp32 before any arithmetic, but autograd
        rounds the gradient of a 16-bit tensor to 16 bits, so pass fp32 log-probs.
    chosen_offsets, rejected_offsets [P+1]: int32 or int64, starting at 0.
    ground_truth [Ng], ground_truth_offsets [P+1]: for an `AuxiliaryNLL` on the ground truth.
    preference [P] bool: False skips the preference term of that pair; None means all True.
    unpaired [P] bool: True for a row of one labelled response. It is in `chosen` if desirable and in `rejected` if
        undesirable, and the other one is empty. None means all False.
    kl: the reference point of kto, a scalar (see kto.py).
    weights [P]: factors of the pairs' preference terms, without grad (see wpo.py); None means all 1. An NLL is not multiplied.

    Raises ValueError on shapes, dtypes or devices that do not match. For CPU tensors it also raises ValueError on offsets
    that do not cover the tokens and on an empty response in a pair that is compared.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_offsets: Tensor
    rejected_offsets: Tensor
    ground_truth: Tensor | None = None
    ground_truth_offsets: Tensor | None = None
    preference: Tensor | None = None
    unpaired: Tensor | None = None
    kl: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        _check_ragged("chosen", self.chosen, self.chosen_offsets)
        _check_ragged("rejected", self.rejected, self.rejected_offsets)
        _check_same_pairs("rejected", self.rejected_offsets, self.chosen_offsets)
        if (self.ground_truth is None) != (self.ground_truth_offsets is None):
            raise ValueError("ground_truth and ground_truth_offsets must be given together")
        if self.ground_truth is not None and self.ground_truth_offsets is not None:
            _check_ragged("ground_truth", self.ground_truth, self.ground_truth_offsets)
            _check_same_pairs("ground_truth", self.ground_truth_offsets, self.chosen_offsets)
        for name, mask in (("preference", self.preference), ("unpaired", self.unpaired)):
            if mask is None:
                continue
            if mask.dtype != torch.bool or mask.shape != (self.num_pairs,) or mask.device != self.device:
                raise ValueError(
                    f"{name} is {mask.dtype} of shape {tuple(mask.shape)} on {mask.device}, expected bool of shape "
                    f"({self.num_pairs},) on {self.device}"
                )
        if self.kl is not None and not isinstance(self.kl, Tensor):
            raise ValueError(f"kl is {self.kl!r}, expected a scalar tensor; torch.tensor({self.kl!r}) makes one")
        if self.kl is not None and (self.kl.shape != () or self.kl.device != self.device):
            raise ValueError(f"kl is {tuple(self.kl.shape)} on {self.kl.device}, expected a scalar on {self.device}")
        if self.weights is not None:
            w = self.weights
            if not w.is_floating_point() or w.shape != (self.num_pairs,) or w.device != self.device or w.requires_grad:
                raise ValueError(
                    f"weights are {w.dtype} of shape {tuple(w.shape)} on {w.device}{' with grad' * w.requires_grad}, expected "
                    f"floating point of shape ({self.num_pairs},) on {self.device} without grad"
                )
        _check_not_empty(self)

    @property
    def num_pairs(self) -> int:
        return self.chosen_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.chosen_offsets.device

    @classmethod
    def from_pairs(
        cls,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        ground_truth: Sequence[Tensor] | None = None,
        preference: Sequence[bool] | None = None,
        unpaired: Sequence[bool] | None = None,
        kl: Tensor | None = None,
    ) -> PairLogprobs:
        """Builds the log-probs from one tuple (chosen, rejected) of 1-D tensors per pair, as score_pairs returns them."""
        if not pairs:
            raise ValueError("pairs is empty")
        chosen, chosen_offsets = _flatten("chosen", [pair[0] for pair in pairs])
        rejected, rejected_offsets = _flatten("rejected", [pair[1] for pair in pairs])
        on_host = {"chosen_offsets": chosen_offsets, "rejected_offsets": rejected_offsets}
        truth = None
        if ground_truth is not None:
            truth, on_host["ground_truth_offsets"] = _flatten("ground_truth", ground_truth)
        for name, mask in (("preference", preference), ("unpaired", unpaired)):
            if mask is not None:
                on_host[name] = torch.tensor(mask, dtype=torch.bool)
        return cls(chosen=chosen, rejected=rejected, ground_truth=truth, kl=kl, **to_device(on_host, chosen.device))

    @classmethod
    def from_unpaired(
        cls, responses: Sequence[Tensor], labels: Sequence[bool], *, kl: Tensor | None = None
    ) -> PairLogprobs:
        """Builds rows of one response each, for kto: 1-D tensors of log-probs, and True for each one that is desirable."""
        if len(responses) != len(labels):
            raise ValueError(f"{len(responses)} responses, but {len(labels)} labels")
        couples = [(y, y[:0]) if label else (y[:0], y) for y, label in zip(responses, labels, strict=True)]
        return cls.from_pairs(couples, unpaired=[True] * len(couples), kl=kl)

    @classmethod
    def from_sums(cls, chosen: Tensor, rejected: Tensor) -> PairLogprobs:
        """Builds a reference from one summed log-prob per response, [P] and [P].

        A reference only. In a policy each sum would count as a response of one token: its mean would be the sum (ipo,
        sigmoid_norm, the losses that read means, NLLs per token), and ld_alpha would have no effect.
        """
        offsets = torch.arange(chosen.shape[0] + 1, device=chosen.device)
        return cls(chosen, rejected, offsets, offsets)

    @classmethod
    def from_padded(
        cls,
        logps: Tensor,
        mask: Tensor,
        *,
        preference: Tensor | None = None,
        unpaired: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> PairLogprobs:
        """Builds the log-probs from logps [2P, T] and a bool mask of its real tokens, chosen half first (as in Liger and TRL).

        Needs no host sync on a GPU: the flat tensors keep P*T entries there, and the offsets mark the valid ones.
        """
        if logps.dim() != 2 or logps.shape[0] % 2 or mask.shape != logps.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"logps is {tuple(logps.shape)} and mask is {mask.dtype} {tuple(mask.shape)}, expected [2P, T] and "
                "bool [2P, T]"
            )
        chosen, chosen_offsets = _compact(*(half.chunk(2)[0] for half in (logps, mask)))
        rejected, rejected_offsets = _compact(*(half.chunk(2)[1] for half in (logps, mask)))
        offsets = chosen_offsets, rejected_offsets
        return cls(chosen, rejected, *offsets, preference=preference, unpaired=unpaired, kl=kl)


@dataclass(frozen=True, eq=False)
class LossOutput:
    """Result of a loss. The loss of a batch is `losses.mean()`, the mean over all P pairs.

    losses [P]: with autograd.
    chosen_rewards, rejected_rewards [P]: detached; 0 for a pair that is not compared.
    chosen_logps, rejected_logps [P]: detached; the sum or the mean of log-probs, whichever the loss uses.
    metrics: detached scalars. rewards/{chosen,rejected,accuracies,margins} and logps/{chosen,rejected} are means over
        the compared pairs, or 0 if no pair is compared. nll_loss is the NLL per chosen token over the batch.
        preference_pairs and empty_pairs are counts; preference_pairs is the weight of the means when averaging batches.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    metrics: dict[str, Tensor]


def compared_pairs(policy: PairLogprobs) -> Tensor:
    """Mask of the pairs that take part in the preference term, bool [P]."""
    not_empty = _not_empty_rows(policy)
    return not_empty if policy.preference is None else not_empty & policy.preference


def preference_output(
    policy: PairLogprobs,
    losses: Tensor,
    *,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
) -> LossOutput:
    """Builds the LossOutput from values per pair [P]: weighs and masks them, and computes the metrics."""
    if policy.weights is not None:
        losses = losses * policy.weights.to(losses.dtype)
    with torch.no_grad():
        chosen_nll = -segment_sum(policy.chosen, policy.chosen_offsets).sum()
    return masked_output(
        compared_pairs(policy),
        losses,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_nll=chosen_nll,
        num_chosen_tokens=policy.chosen_offsets[-1],
        num_empty=_num_empty_rows(policy),
    )


def masked_output(
    compared: Tensor,
    losses: Tensor,
    *,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_nll: Tensor,
    num_chosen_tokens: Tensor,
    num_empty: Tensor,
) -> LossOutput:
    """Builds the LossOutput from a mask compared [P] and chosen_nll, the NLL summed over the batch's num_chosen_tokens tokens."""
    losses = torch.where(compared, losses, 0.0)
    with torch.no_grad():
        chosen_rewards = torch.where(compared, chosen_rewards, 0.0)
        rejected_rewards = torch.where(compared, rejected_rewards, 0.0)
        num_compared = compared.sum()

        def mean(values: Tensor) -> Tensor:
            return torch.where(compared, values, 0.0).sum() / num_compared.clamp(min=1)

        metrics = {
            "rewards/chosen": mean(chosen_rewards),
            "rewards/rejected": mean(rejected_rewards),
            "rewards/accuracies": mean((chosen_rewards > rejected_rewards).to(losses.dtype)),
            "rewards/margins": mean(chosen_rewards - rejected_rewards),
            "logps/chosen": mean(chosen_logps),
            "logps/rejected": mean(rejected_logps),
            "nll_loss": chosen_nll / num_chosen_tokens.clamp(min=1),
            "preference_pairs": num_compared.to(losses.dtype),
            "empty_pairs": num_empty.to(losses.dtype),
        }
    return LossOutput(
        losses=losses,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        chosen_logps=chosen_logps.detach(),
        rejected_logps=rejected_logps.detach(),
        metrics=metrics,
    )


def host_can_read(tensor: Tensor) -> bool:
    """True if the host can read the tensor's values without a device sync."""
    return tensor.device.type == "cpu"


def _not_empty_rows(policy: PairLogprobs) -> Tensor:
    """Mask of the rows that hold what they must, [P]: both responses of a pair, one of an unpaired row."""
    has_chosen, has_rejected = segment_lengths(policy.chosen_offsets) > 0, segment_lengths(policy.rejected_offsets) > 0
    both = has_chosen & has_rejected
    return both if policy.unpaired is None else torch.where(policy.unpaired, has_chosen ^ has_rejected, both)


def _num_empty_rows(policy: PairLogprobs) -> Tensor:
    """The number of rows that would be compared and lack a response."""
    empty = ~_not_empty_rows(policy)
    return (empty if policy.preference is None else empty & policy.preference).sum()


def _check_ragged(name: str, logps: Tensor, offsets: Tensor) -> None:
    if logps.dim() != 1 or not logps.is_floating_point():
        raise ValueError(f"{name} is {logps.dtype} of shape {tuple(logps.shape)}, expected a 1-D floating tensor")
    if offsets.dim() != 1 or offsets.shape[0] < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name}_offsets is {offsets.dtype} of shape {tuple(offsets.shape)}, expected int32 or int64 [P+1], P >= 1"
        )
    if logps.device != offsets.device:
        raise ValueError(f"{name} is on {logps.device}, {name}_offsets on {offsets.device}")
    if host_can_read(offsets):
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != logps.shape[0] or bool((segment_lengths(offsets) < 0).any()):
            raise ValueError(f"{name}_offsets is {values}, expected to rise from 0 to {logps.shape[0]} tokens")


def _check_same_pairs(name: str, offsets: Tensor, chosen_offsets: Tensor) -> None:
    if offsets.shape != chosen_offsets.shape or offsets.device != chosen_offsets.device:
        raise ValueError(
            f"{name}_offsets is {tuple(offsets.shape)} on {offsets.device}, chosen_offsets "
            f"{tuple(chosen_offsets.shape)} on {chosen_offsets.device}"
        )


def _check_not_empty(policy: PairLogprobs) -> None:
    if not host_can_read(policy.chosen_offsets):
        return
    wrong = ~_not_empty_rows(policy)
    if policy.preference is not None:
        wrong = wrong & policy.preference
    if not bool(wrong.any()):
        return
    row = int(wrong.nonzero()[0])
    chosen, rejected = (int(segment_lengths(each)[row]) for each in (policy.chosen_offsets, policy.rejected_offsets))
    if policy.unpaired is not None and bool(policy.unpaired[row]):
        raise ValueError(
            f"unpaired row {row} has {chosen} chosen and {rejected} rejected tokens, expected one response"
        )
    raise ValueError(f"{'rejected' if chosen else 'chosen'} response of pair {row} is empty")


def _flatten(name: str, responses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns all tokens concatenated on their device, and the offsets on the host."""
    offsets = [0]
    for i, logps in enumerate(responses):
        if logps.dim() != 1:
            raise ValueError(f"{name} log-probs of pair {i} have shape {tuple(logps.shape)}, expected [T]")
        offsets.append(offsets[-1] + logps.shape[0])
    return torch.cat([upcast(logps) for logps in responses]), torch.tensor(offsets)


def _compact(logps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the real tokens of logps [P, T] in order (on a GPU followed by the masked ones), and offsets [P+1]."""
    order = torch.argsort((~mask).flatten().to(torch.uint8), stable=True)
    flat = logps.flatten()[order]
    offsets = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(dim=1).cumsum(0)])
    return (flat[: int(offsets[-1])] if host_can_read(offsets) else flat), offsets
