"""DPO (arXiv 2305.18290) and two variants on the same log-ratios: hinge and IPO.

    r(y) = sum_t (lp_t - ref_t)          h = r(y+) - r(y-)
    sigmoid   L = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h)       eps = label_smoothing
    hinge     L = max(0, 1 - beta * h)
    ipo       L = (r(y+)/T+ - r(y-)/T- - 1/(2*beta))^2                     arXiv 2310.12036, whose tau is beta

eps > 0 is conservative DPO (a fraction eps of the labels is assumed to be flipped). It is not the loss `robust`, which also
divides by 1 - 2*eps and changes a sign. TRL's and Liger's "sigmoid" ignores label_smoothing. IPO averages over tokens, as TRL
does and as its authors did in their experiments; the other two variants sum. The reward beta * r(y) is a sum for every variant.

f_divergence replaces r by another score (f_divergence.py in dpo_types/), ld_alpha gives tokens of the longer response less
weight (log_ratios.py there).
"""

from __future__ import annotations

import torch.nn.functional as F

from synpo_fast.losses.checks import check_choice, check_label_smoothing
from synpo_fast.losses.dpo_types.difference import hinge, ipo
from synpo_fast.losses.dpo_types.f_divergence import COEFFICIENT, score_difference
from synpo_fast.losses.dpo_types.log_ratios import log_ratios
from synpo_fast.losses.pair import LossOutput, PairLogprobs

VARIANTS = ("sigmoid", "hinge", "ipo")


def dpo(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """DPO loss per pair. The log-probs in the output are sums.

    reference: log-probs of the same responses, one per token or one sum per response, without grad. Their context may
        differ from the policy's (LongVPO's anchor clip). Response lengths are compared with the policy's on the CPU only.
    ld_alpha: below 1 it needs a reference with a log-prob per token.
    reference_free: use ref_t = 0; a reference must then not be given.
    Raises ValueError on beta <= 0, label_smoothing outside [0, 0.5) or with a variant other than "sigmoid", ld_alpha outside
    [0, 1], an unknown variant or f_divergence, and a reference that is missing, unneeded, requires grad, or holds other
    responses.
    """
    check_choice("variant", variant, VARIANTS)
    check_label_smoothing(label_smoothing, variant)
    if variant != "sigmoid":
        return {"hinge": hinge, "ipo": ipo}[variant](
            policy,
            reference,
            beta=beta,
            f_divergence=f_divergence,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            ld_alpha=ld_alpha,
            reference_free=reference_free,
        )
    r = log_ratios("dpo", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    z = beta * score_difference(r, f_divergence, f_alpha_divergence_coef)
    return r.output(-(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z))
