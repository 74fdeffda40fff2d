"""DPO's loss types that move each response's own log-ratio, not only the difference. Their names are TRL's and Liger's.

    x(y) = beta * r(y), the reward of a response
    nca_pair    L = -log sigmoid(x+) - 0.5 * log sigmoid(-x+) - 0.5 * log sigmoid(-x-)    NCA, arXiv 2402.05369
    bco_pair    L = -log sigmoid(x+) - log sigmoid(-x-)                                   BCO, arXiv 2404.04656, with shift 0
    sppo_hard   L = (r+ - 1/(2*beta))^2 + (r- + 1/(2*beta))^2                             SPPO, arXiv 2405.00675
    apo_zero    L = sigmoid(-x+) + sigmoid(x-)                                            APO, arXiv 2408.06266, (7)
    apo_down    L = sigmoid(x+) + sigmoid(-(x+ - x-))                                     APO, arXiv 2408.06266, (8)

sppo_hard takes 1 and 0 as the probabilities that the chosen and the rejected response win; the paper estimates them. apo_zero
is for chosen responses that are better than the model's own, apo_down for chosen responses that are worse. 1 - sigmoid(x) is
computed as sigmoid(-x), which keeps its precision; the values are those of TRL and Liger. ld_alpha is explained in
log_ratios.py. These types have no form with another divergence (f_divergence), as in TRL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from synpo_fast.losses.dpo_types.log_ratios import log_ratios
from synpo_fast.losses.pair import LossOutput, PairLogprobs


def nca_pair(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """NCA loss per pair: raises the chosen reward and keeps both from growing. Arguments and errors as in dpo."""
    r = log_ratios("nca_pair", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    chosen, rejected = r.rewards
    return r.output(-F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected))


def bco_pair(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """BCO loss per pair, a classifier of chosen against rejected rewards. Arguments and errors as in dpo.

    The paper subtracts a running mean of the rewards first; TRL's and Liger's bco_pair do not, and nor does this.
    """
    r = log_ratios("bco_pair", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    chosen, rejected = r.rewards
    return r.output(-F.logsigmoid(chosen) - F.logsigmoid(-rejected))


def sppo_hard(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """SPPO loss per pair: pulls the log-ratios towards 1/(2*beta) and -1/(2*beta). Arguments and errors as in dpo."""
    r = log_ratios("sppo_hard", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    return r.output((r.chosen - 0.5 / beta) ** 2 + (r.rejected + 0.5 / beta) ** 2)


def apo_zero(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """APO-zero loss per pair: raises the chosen reward and lowers the rejected one. Arguments and errors as in dpo."""
    r = log_ratios("apo_zero", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    chosen, rejected = r.rewards
    return r.output(torch.sigmoid(-chosen) + torch.sigmoid(rejected))


def apo_down(
    policy: PairLogprobs,
    reference: PairLogprobs | None = None,
    *,
    beta: float = 0.1,
    ld_alpha: float = 1.0,
    reference_free: bool = False,
) -> LossOutput:
    """APO-down loss per pair: lowers both rewards, the rejected one more. Arguments and errors as in dpo."""
    r = log_ratios("apo_down", policy, reference, beta=beta, ld_alpha=ld_alpha, reference_free=reference_free)
    chosen, rejected = r.rewards
    return r.output(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen))
