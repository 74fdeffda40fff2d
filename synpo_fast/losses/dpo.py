"""DPO (arXiv 2305.18290) and two variants on the same log-ratios: hinge and IPO.

    r(y) = sum_t (lp_t - ref_t)          h = r(y+) - r(y-)
    sigmoid   L = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h)       eps = label_smoothing
    hinge     L = max(0, 1 - beta * h)
    ipo       L = (r(y+)/T+ - r(y-)/T- - 1/(2*beta))^2                     arXiv 2310.12036, whose tau is beta

eps > 0 is conservative DPO (a fraction eps of the labels is assumed to be flipped). It is not TRL's "robust" loss, which also
divides by 1 - 2*eps and changes a sign. IPO averages over tokens, as TRL does and as its authors did in their experiments; the
other two variants sum. The reward beta * r(y) is a sum for every variant.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.losses.checks import check_choice, check_label_smoothing, check_number
from synpo_fast.losses.pair import LossOutput, PairLogprobs, host_can_read, preference_output
from synpo_fast.losses.segments import segment_lengths, segment_sum

VARIANTS = ("sigmoid", "hinge", "ipo")


def dpo(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> LossOutput:
    """DPO loss per pair. The log-probs in the output are sums.

    reference: log-probs of the same responses, one per token or one sum per response, without grad. Their context may
        differ from the policy's (LongVPO's anchor clip). Response lengths are compared with the policy's on the CPU only.
    reference_free: use ref_t = 0; a reference must then not be given.
    Raises ValueError on beta <= 0, label_smoothing outside [0, 0.5) or with a variant other than "sigmoid", an unknown
    variant, and a reference that is missing, unneeded, requires grad, or holds other responses.
    """
    check_number("beta", beta, above=0.0)
    check_choice("variant", variant, VARIANTS)
    check_label_smoothing(label_smoothing, variant)
    chosen_logps = segment_sum(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_sum(policy.rejected, policy.rejected_offsets)
    chosen_logratios, rejected_logratios = chosen_logps, rejected_logps
    if reference_free and reference is not None:
        raise ValueError("reference_free is True, but a reference was given")
    if not reference_free:
        if reference is None:
            raise ValueError("dpo needs a reference, or reference_free=True")
        chosen_ref, rejected_ref = reference_sums(policy, reference)
        chosen_logratios, rejected_logratios = chosen_logps - chosen_ref, rejected_logps - rejected_ref

    h = chosen_logratios - rejected_logratios
    if variant == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    elif variant == "hinge":
        losses = torch.relu(1 - beta * h)
    else:
        T_chosen = segment_lengths(policy.chosen_offsets).clamp(min=1)
        T_rejected = segment_lengths(policy.rejected_offsets).clamp(min=1)
        losses = (chosen_logratios / T_chosen - rejected_logratios / T_rejected - 1 / (2 * beta)) ** 2
    return preference_output(
        policy,
        losses,
        chosen_rewards=beta * chosen_logratios,
        rejected_rewards=beta * rejected_logratios,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )


def reference_sums(policy: PairLogprobs, reference: PairLogprobs) -> tuple[Tensor, Tensor]:
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
    return (
        segment_sum(reference.chosen, reference.chosen_offsets),
        segment_sum(reference.rejected, reference.rejected_offsets),
    )


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
