"""Log-ratios of responses to a reference, the input of DPO and of its other loss types.

    r(y) = sum_t w_t * (lp_t - ref_t)
    w_t  = 1 for the first min(T+, T-) tokens of a response, ld_alpha for the tokens beyond them

ld_alpha below 1 is LD-DPO (arXiv 2409.06411): the tokens by which one response is longer than the other count less, in the
policy and in the reference alike. The default, 1, is the plain sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from synpo_fast.losses.checks import check_number
from synpo_fast.losses.pair import LossOutput, PairLogprobs, host_can_read, preference_output
from synpo_fast.losses.segments import segment_ids, segment_lengths, segment_sum, upcast


@dataclass(frozen=True, eq=False)
class LogRatios:
    """The sums of a batch's log-probs, [P] each: the policy's with autograd, the reference's (0 if there is none) without."""

    policy: PairLogprobs
    beta: float
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_ref: Tensor
    rejected_ref: Tensor

    @cached_property
    def chosen(self) -> Tensor:
        """r(y+) [P], with autograd."""
        return self.chosen_logps - self.chosen_ref

    @cached_property
    def rejected(self) -> Tensor:
        """r(y-) [P], with autograd."""
        return self.rejected_logps - self.rejected_ref

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """beta * r(y), [P] each, with autograd."""
        return self.beta * self.chosen, self.beta * self.rejected

    def output(self, losses: Tensor) -> LossOutput:
        """The LossOutput for losses [P], with the rewards beta * r(y)."""
        chosen_rewards, rejected_rewards = self.rewards
        return preference_output(
            self.policy,
            losses,
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            chosen_logps=self.chosen_logps,
            rejected_logps=self.rejected_logps,
        )


def log_ratios(
    name: str,
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    *,
    beta: float,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LogRatios:
    """Computes the log-ratios for the loss called `name`, which only the messages use.

    reference: log-probs of the same responses, one per token or one sum per response, without grad. Their context may
        differ from the policy's (LongVPO's anchor clip). Response lengths are compared with the policy's on the CPU only.
    reference_free: use ref_t = 0; a reference must then not be given.
    Raises ValueError on beta <= 0, on ld_alpha outside [0, 1] or below 1 with one sum per response, and on a reference that is
    missing, unneeded, requires grad, or holds other responses.
    """
    check_number("beta", beta, above=0.0)
    check_number("ld_alpha", ld_alpha, at_least=0.0, at_most=1.0)
    chosen_logps, rejected_logps = _weighted_sums(policy, policy, ld_alpha)
    if reference_free and reference is not None:
        raise ValueError("reference_free is True, but a reference was given")
    if reference_free:
        refs = torch.zeros_like(chosen_logps), torch.zeros_like(rejected_logps)
    elif reference is None:
        raise ValueError(f"{name} needs a reference{'' if name == 'aot' else ', or reference_free=True'}")
    else:
        refs = reference_sums(policy, reference, ld_alpha=ld_alpha)
    return LogRatios(policy, beta, chosen_logps, rejected_logps, *refs)


def reference_sums(policy: PairLogprobs, reference: PairLogprobs, *, ld_alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns the summed reference log-probs of the chosen responses [P] and the rejected responses [P]."""
    if reference.num_pairs != policy.num_pairs or reference.device != policy.device:
        raise ValueError(
            f"reference has {reference.num_pairs} pairs on {reference.device}, "
            f"policy {policy.num_pairs} on {policy.device}"
        )
    if reference.chosen.requires_grad or reference.rejected.requires_grad:
        raise ValueError("reference log-probs require grad: compute them under torch.no_grad()")
    _check_same_responses("chosen", reference.chosen_offsets, policy.chosen_offsets)
    _check_same_responses("rejected", reference.rejected_offsets, policy.rejected_offsets)
    shapes = [(each.chosen.shape[0], each.rejected.shape[0]) for each in (reference, policy)]
    if ld_alpha != 1.0 and shapes[0] != shapes[1]:
        raise ValueError(
            f"ld_alpha is {ld_alpha}, which needs the reference's log-prob of every token: got {shapes[0]} values for "
            f"{shapes[1]} tokens of chosen and rejected responses"
        )
    return _weighted_sums(reference, policy, ld_alpha)


def _weighted_sums(logps: PairLogprobs, policy: PairLogprobs, ld_alpha: float) -> tuple[Tensor, Tensor]:
    """The sums over each chosen and each rejected response, [P] each, with ld_alpha as the weight of the longer one's tail."""
    halves = ((logps.chosen, logps.chosen_offsets), (logps.rejected, logps.rejected_offsets))
    if ld_alpha == 1.0:
        chosen, rejected = (segment_sum(*half) for half in halves)
        return chosen, rejected
    shared_P = torch.minimum(segment_lengths(policy.chosen_offsets), segment_lengths(policy.rejected_offsets))
    chosen, rejected = (segment_sum(_tail_weighted(*half, shared_P, ld_alpha), half[1]) for half in halves)
    return chosen, rejected


def _tail_weighted(logps: Tensor, offsets: Tensor, shared_P: Tensor, ld_alpha: float) -> Tensor:
    """logps [N], with those after the first shared_P[i] tokens of response i multiplied by ld_alpha."""
    ends_P = offsets[:-1].to(torch.int64) + shared_P
    ends_N = torch.cat([ends_P, ends_P.new_zeros(1)])[segment_ids(offsets, logps.shape[0])]
    x = upcast(logps)
    return torch.where(torch.arange(x.shape[0], device=x.device) < ends_N, x, ld_alpha * x)


def _check_same_responses(name: str, reference_offsets: Tensor, policy_offsets: Tensor) -> None:
    if not host_can_read(policy_offsets):
        return
    reference_list, policy_list = reference_offsets.tolist(), policy_offsets.tolist()
    one_per_response = list(range(len(policy_list)))
    if reference_list not in (policy_list, one_per_response):
        raise ValueError(
            f"reference {name}_offsets is {reference_list}, expected {policy_list} (a value per token) or "
            f"{one_per_response} (a sum per response)"
        )
