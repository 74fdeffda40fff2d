"""DPO's loss types that compare the two scores of a pair. Their names are TRL's and Liger's.

    s(y) = score of the log-ratio r(y); r(y) itself unless f_divergence is set           d = s(y+) - s(y-)
    z    = beta * d
    hinge          L = max(0, 1 - z)                                                            RSO, arXiv 2309.06657
    ipo            L = (s(y+)/T+ - s(y-)/T- - 1/(2*beta))^2                                     arXiv 2310.12036
    sigmoid_norm   L = -log sigmoid(beta * (s(y+)/T+ - s(y-)/T-))                               Tulu 3, arXiv 2411.15124
    robust         L = (-(1 - eps) * log sigmoid(z) + eps * log sigmoid(-z)) / (1 - 2*eps)      arXiv 2403.00409
    exo_pair       L = KL(sigmoid(z), sigmoid(-z) || 1 - eps, eps)                              EXO, arXiv 2402.00856
    discopop       L = -log sigmoid(z) * (1 - m) + exp(-z) * m        m = sigmoid(z / tau)      arXiv 2406.08414

eps = label_smoothing, tau = discopop_tau. The formulas are TRL's and Liger's. Liger has neither ipo nor sigmoid_norm. T counts
all tokens of a response, also where ld_alpha is below 1. f_divergence is explained in f_divergence.py, ld_alpha in log_ratios.py.
The reward beta * r(y) is a sum for every type.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from synpo_fast.losses.checks import check_label_smoothing, check_number
from synpo_fast.losses.dpo_types.f_divergence import COEFFICIENT, MAX_EXPONENT, score_difference, scores
from synpo_fast.losses.dpo_types.log_ratios import LogRatios, log_ratios
from synpo_fast.losses.pair import LossOutput, PairLogprobs
from synpo_fast.losses.segments import segment_lengths


def hinge(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """Hinge loss per pair. The same as dpo with variant="hinge". Arguments and errors as in dpo."""
    r = log_ratios("hinge", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    d = score_difference(r, f_divergence, f_alpha_divergence_coef)
    return r.output(torch.relu(1 - beta * d))


def ipo(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """IPO loss per pair; beta is the paper's tau. The same as dpo with variant="ipo". Arguments and errors as in dpo.

    The scores are divided by the lengths, as in TRL and in the experiments of IPO's authors; the paper does not say so.
    """
    r = log_ratios("ipo", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    return r.output((_difference_per_token(r, f_divergence, f_alpha_divergence_coef) - 1 / (2 * beta)) ** 2)


def sigmoid_norm(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """Length-normalised DPO loss per pair. Arguments and errors as in dpo."""
    r = log_ratios("sigmoid_norm", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    return r.output(-F.logsigmoid(beta * _difference_per_token(r, f_divergence, f_alpha_divergence_coef)))


def robust(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """Robust DPO loss per pair: its mean over randomly flipped labels is DPO's loss without flips.

    label_smoothing: the share of labels that are flipped. With 0 this is dpo.
    Raises ValueError on label_smoothing outside [0, 0.5); other arguments and errors as in dpo.
    """
    check_label_smoothing(label_smoothing, "sigmoid")
    r = log_ratios("robust", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    z = beta * score_difference(r, f_divergence, f_alpha_divergence_coef)
    clean, flipped = (1 - label_smoothing) * F.logsigmoid(z), label_smoothing * F.logsigmoid(-z)
    return r.output((flipped - clean) / (1 - 2 * label_smoothing))


def exo_pair(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """EXO loss per pair: the reverse KL from the preference of the log-ratios to the labels.

    label_smoothing: the labels' probability of the rejected response. TRL and Liger have no default that works here; 1e-3 is
        the paper's value.
    Raises ValueError on label_smoothing outside (0, 0.5); other arguments and errors as in dpo.
    """
    check_number("label_smoothing", label_smoothing, above=0.0, below=0.5)
    r = log_ratios("exo_pair", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    z = beta * score_difference(r, f_divergence, f_alpha_divergence_coef)
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))
    return r.output(chosen + rejected)


def discopop(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = COEFFICIENT,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """DiscoPOP loss per pair: a blend of the logistic and the exponential loss, found by a search over programs.

    exp(-z) * m is computed as exp(-z + log m), which is at most 1 for discopop_tau <= 1. TRL and Liger multiply the two
    factors, which is inf * 0 = nan in fp32 for z below -88. For discopop_tau > 1 the product itself grows; the exponent is then
    cut at 40, where its gradient becomes 0.
    Raises ValueError on discopop_tau <= 0; other arguments and errors as in dpo.
    """
    check_number("discopop_tau", discopop_tau, above=0.0)
    r = log_ratios("discopop", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    z = beta * score_difference(r, f_divergence, f_alpha_divergence_coef)
    exponential = (F.logsigmoid(z / discopop_tau) - z).clamp(max=MAX_EXPONENT).exp()
    return r.output(-F.logsigmoid(z) * torch.sigmoid(-z / discopop_tau) + exponential)


def _difference_per_token(r: LogRatios, f_divergence: str, f_alpha_divergence_coef: float) -> torch.Tensor:
    """The difference of the scores, each divided by its response's number of tokens, [P]."""
    chosen, rejected = scores(r, f_divergence, f_alpha_divergence_coef)
    lengths = [
        segment_lengths(offsets).clamp(min=1) for offsets in (r.policy.chosen_offsets, r.policy.rejected_offsets)
    ]
    return chosen / lengths[0] - rejected / lengths[1]
