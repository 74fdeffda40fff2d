"""Scores of f-DPO (arXiv 2309.16240): DPO with another divergence from the reference than the reverse KL.

With t = exp(r(y)) the score of a response is f'(t), up to a constant that cancels in the difference of two scores:

    reverse_kl         r                                       DPO itself
    forward_kl         1 - exp(-r)
    js_divergence      log 2 + log sigmoid(r)
    alpha_divergence   (exp((a - 1) * r) - 1) / (a - 1)        a = f_alpha_divergence_coef; reverse_kl for a = 1

An exponential overflows for responses of some hundred tokens. Its argument is cut at MAX_EXPONENT, where the gradient becomes
0; the square of exp(40) is still finite in fp32. TRL 1.16 cuts alpha_divergence at 80 and forward_kl nowhere, so that its
forward_kl is nan where both log-ratios are below -88.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.losses.checks import check_choice, check_number
from synpo_fast.losses.dpo_types.log_ratios import LogRatios

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
COEFFICIENT = 0.5  # the default of f_alpha_divergence_coef
MAX_EXPONENT = 40.0


def scores(ratios: LogRatios, f_divergence: str, f_alpha_divergence_coef: float) -> tuple[Tensor, Tensor]:
    """The scores of the chosen and of the rejected responses, [P] each.

    Raises ValueError on an unknown divergence, and on a coefficient given with another divergence than alpha_divergence.
    """
    check_choice("f_divergence", f_divergence, DIVERGENCES)
    check_number("f_alpha_divergence_coef", f_alpha_divergence_coef)
    if f_divergence != "alpha_divergence" and f_alpha_divergence_coef != COEFFICIENT:
        raise ValueError(
            f"f_alpha_divergence_coef is {f_alpha_divergence_coef}, but f_divergence {f_divergence!r} has no coefficient: "
            "set f_divergence to 'alpha_divergence'"
        )
    chosen, rejected = (_score(r, f_divergence, f_alpha_divergence_coef) for r in (ratios.chosen, ratios.rejected))
    return chosen, rejected


def score_difference(ratios: LogRatios, f_divergence: str, f_alpha_divergence_coef: float) -> Tensor:
    """Chosen score minus rejected score, [P]. For reverse_kl this is h = r(y+) - r(y-)."""
    chosen, rejected = scores(ratios, f_divergence, f_alpha_divergence_coef)
    return chosen - rejected


def _score(r: Tensor, f_divergence: str, coefficient: float) -> Tensor:
    if f_divergence == "forward_kl":
        return -torch.expm1((-r).clamp(max=MAX_EXPONENT))
    if f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(r)
    if f_divergence == "alpha_divergence" and abs(coefficient - 1) >= 1e-6:
        return torch.expm1(((coefficient - 1) * r).clamp(max=MAX_EXPONENT)) / (coefficient - 1)
    return r
