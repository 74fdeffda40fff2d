"""CPO (arXiv 2401.08417): DPO with a uniform reference, plus NLL on the chosen response.

    h = sum_t lp_t(y+) - sum_t lp_t(y-)
    sigmoid   L = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h) + nll_weight * NLL(y+)
    hinge     L = max(0, 1 - beta * h) + nll_weight * NLL(y+)

eps = label_smoothing. The loss compares sums of log-probs. By default the NLL is a mean over all chosen tokens of the batch,
as in TRL and Liger (nll_reduce, see nll.py). The paper writes a sum, which nll_reduce="sum" gives.
Reward: beta * sum_t lp_t.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from synpo_fast.losses.checks import check_choice, check_label_smoothing, check_number
from synpo_fast.losses.nll import REDUCES, nll
from synpo_fast.losses.pair import LossOutput, PairLogprobs, preference_output
from synpo_fast.losses.segments import segment_sum

VARIANTS = ("sigmoid", "hinge")


def cpo(
    policy: PairLogprobs,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    nll_reduce: str = "batch_token_mean",
) -> LossOutput:
    """CPO loss per pair, including its NLL. The log-probs in the output are sums.

    A pair that is not compared keeps the NLL of its chosen response.
    Raises ValueError on beta <= 0, nll_weight < 0, label_smoothing outside [0, 0.5) or with the hinge, and an
    unknown variant or nll_reduce.
    """
    check_number("beta", beta, above=0.0)
    check_number("nll_weight", nll_weight, at_least=0.0)
    check_choice("variant", variant, VARIANTS)
    check_choice("nll_reduce", nll_reduce, REDUCES)
    check_label_smoothing(label_smoothing, variant)
    chosen_logps = segment_sum(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_sum(policy.rejected, policy.rejected_offsets)
    h = chosen_logps - rejected_logps
    if variant == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    else:
        losses = torch.relu(1 - beta * h)
    output = preference_output(
        policy,
        losses,
        chosen_rewards=beta * chosen_logps,
        rejected_rewards=beta * rejected_logps,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )
    return replace(output, losses=output.losses + nll_weight * nll(policy, reduce=nll_reduce))
