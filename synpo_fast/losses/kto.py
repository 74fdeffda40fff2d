"""KTO (arXiv 2402.01306) and APO-zero for responses with a label each, desirable or undesirable, instead of pairs.

    r(y) = sum_t (lp_t - ref_t)          z0 = max(0, mean of r over mismatched responses), without gradient
    kto                 L = w+ * (1 - sigmoid(beta * (r - z0)))  if y is desirable,   w- * (1 - sigmoid(beta * (z0 - r)))  if not
    apo_zero_unpaired   the same with z0 = 0                     arXiv 2408.06266, the form that TRL gives to single responses

z0 is KTO's reference point: an estimate of the KL divergence from the reference to the policy, from responses that belong to
other prompts (`kl_reference_point`). It enters as policy.kl, because the mean may go over several processes. w+ and w- are
desirable_weight and undesirable_weight. The loss of a batch is the mean over its responses. The reward is beta * r.

A row of the policy is one labelled response (`unpaired`) or a pair, whose chosen response is desirable and whose rejected
response is undesirable. If a batch has both kinds of rows, a row's loss is scaled so that the mean over rows is the mean over
responses.

Metrics: rewards/chosen and logps/chosen are means over the desirable responses, .../rejected over the undesirable ones, and
rewards/margins is their difference, as in TRL. rewards/accuracies is ours: the share of responses whose reward lies on the right
side of beta * z0. kl is z0. desirable_responses and undesirable_responses are counts.

1 - sigmoid(z) is computed as sigmoid(-z), in the form that keeps its gradient when the sigmoid saturates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from synpo_fast.losses.checks import check_number
from synpo_fast.losses.dpo_types.log_ratios import reference_sums
from synpo_fast.losses.pair import LossOutput, PairLogprobs, compared_pairs, preference_output
from synpo_fast.losses.segments import segment_lengths, segment_sum
from synpo_fast.losses.synpo import link_function


def kto(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """KTO loss per row. The log-probs in the output are sums.

    policy.kl: the reference point, from `kl_reference_point`.
    reference: log-probs of the same responses, one per token or one sum per response, without grad.
    Raises ValueError if beta <= 0, a weight is negative, policy.kl is None, and on a reference that is missing, requires grad, or
    holds other responses.
    """
    if policy.kl is None:
        raise ValueError(
            "kto needs policy.kl, see kl_reference_point (FusedLinearKTOLoss takes it as kl); apo_zero_unpaired is the loss "
            "without it"
        )
    return _unpaired_loss("kto", policy, reference, policy.kl, beta, desirable_weight, undesirable_weight)


def apo_zero_unpaired(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """APO-zero loss per row, which is KTO with the reference point 0. Arguments and errors are those of `kto`, without kl."""
    zero = torch.zeros((), device=policy.device)
    return _unpaired_loss("apo_zero_unpaired", policy, reference, zero, beta, desirable_weight, undesirable_weight)


@torch.no_grad()
def kl_reference_point(logratio_sum: Tensor, count: Tensor | int) -> Tensor:
    """KTO's reference point: the mean log-ratio of mismatched responses, at least 0, as a detached scalar.

    logratio_sum: the sum over mismatched responses of (log-prob under the policy - log-prob under the reference), on all
        processes. A mismatched response is one that belongs to another prompt than the one it is scored after.
    count: the number of these responses. The result is 0 if there are none.
    """
    count = torch.as_tensor(count, device=logratio_sum.device)
    return (logratio_sum / count.clamp(min=1)).clamp(min=0)


def _unpaired_loss(
    name: str,
    policy: PairLogprobs,
    reference: PairLogprobs | None,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    check_number("beta", beta, above=0.0)
    check_number("desirable_weight", desirable_weight, at_least=0.0)
    check_number("undesirable_weight", undesirable_weight, at_least=0.0)
    if reference is None:
        raise ValueError(f"{name} needs a reference")
    kl = kl.detach()
    desirable, undesirable = _labelled(policy)
    chosen_logps = segment_sum(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_sum(policy.rejected, policy.rejected_offsets)
    chosen_ref, rejected_ref = reference_sums(policy, reference)
    r_chosen, r_rejected = chosen_logps - chosen_ref, rejected_logps - rejected_ref
    gains = desirable_weight * link_function(beta * (kl - r_chosen), "sigmoid")
    pains = undesirable_weight * link_function(beta * (r_rejected - kl), "sigmoid")
    num_rows, num_responses = compared_pairs(policy).sum(), desirable.sum() + undesirable.sum()
    losses = torch.where(desirable, gains, 0.0) + torch.where(undesirable, pains, 0.0)
    output = preference_output(
        policy,
        losses * (num_rows.to(losses.dtype) / num_responses.clamp(min=1)),
        chosen_rewards=torch.where(desirable, beta * r_chosen, 0.0),
        rejected_rewards=torch.where(undesirable, beta * r_rejected, 0.0),
        chosen_logps=torch.where(desirable, chosen_logps, 0.0),
        rejected_logps=torch.where(undesirable, rejected_logps, 0.0),
    )
    return replace(output, metrics=output.metrics | _metrics(output, desirable, undesirable, beta, kl))


def _labelled(policy: PairLogprobs) -> tuple[Tensor, Tensor]:
    """Masks of the rows [P] whose chosen response counts as desirable, and of those whose rejected one counts as undesirable."""
    counted = compared_pairs(policy)
    return (
        counted & (segment_lengths(policy.chosen_offsets) > 0),
        counted & (segment_lengths(policy.rejected_offsets) > 0),
    )


@torch.no_grad()
def _metrics(output: LossOutput, desirable: Tensor, undesirable: Tensor, beta: float, kl: Tensor) -> dict[str, Tensor]:
    """Means over the responses with a label, not over pairs."""
    point = beta * kl
    num_desirable, num_undesirable = desirable.sum(), undesirable.sum()

    def mean(values: Tensor, count: Tensor) -> Tensor:
        return values.sum() / count.clamp(min=1)

    chosen_mean, rejected_mean = (
        mean(output.chosen_rewards, num_desirable),
        mean(output.rejected_rewards, num_undesirable),
    )
    right = (desirable & (output.chosen_rewards > point)).sum() + (
        undesirable & (output.rejected_rewards < point)
    ).sum()
    dtype = output.losses.dtype
    return {
        "rewards/chosen": chosen_mean,
        "rewards/rejected": rejected_mean,
        "rewards/margins": chosen_mean - rejected_mean,
        "rewards/accuracies": right.to(dtype) / (num_desirable + num_undesirable).clamp(min=1),
        "logps/chosen": mean(output.chosen_logps, num_desirable),
        "logps/rejected": mean(output.rejected_logps, num_undesirable),
        "kl": kl.to(dtype),
        "desirable_responses": num_desirable.to(dtype),
        "undesirable_responses": num_undesirable.to(dtype),
    }
