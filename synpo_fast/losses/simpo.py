"""SimPO (arXiv 2405.14734): length-averaged log-probs with a target margin, no reference model.

    m(y) = mean_t lp_t          z = beta * (m(y+) - m(y-)) - gamma
    L    = -(1 - eps) * log sigmoid(z) - eps * log sigmoid(-z)          eps = label_smoothing

gamma is the margin itself, as in the paper and in Liger. The authors' code has gamma_beta_ratio = gamma / beta instead; its
default 0.25 with beta 2 corresponds to gamma 0.5 here. Reward: beta * m(y).
"""

from __future__ import annotations

import torch.nn.functional as F

from synpo_fast.losses.checks import check_label_smoothing, check_number
from synpo_fast.losses.pair import LossOutput, PairLogprobs, preference_output
from synpo_fast.losses.segments import segment_mean


def simpo(policy: PairLogprobs, *, beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> LossOutput:
    """SimPO loss per pair. The log-probs in the output are means.

    Raises ValueError if beta <= 0, gamma is not finite, or label_smoothing lies outside [0, 0.5).
    """
    check_number("beta", beta, above=0.0)
    check_number("gamma", gamma)
    check_label_smoothing(label_smoothing, "sigmoid")
    chosen_logps = segment_mean(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_mean(policy.rejected, policy.rejected_offsets)
    z = beta * (chosen_logps - rejected_logps) - gamma
    return preference_output(
        policy,
        -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z),
        chosen_rewards=beta * chosen_logps,
        rejected_rewards=beta * rejected_logps,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )
