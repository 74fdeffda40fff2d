"""CPO-SimPO: SimPO's length-averaged contrast with a margin, plus CPO's NLL on the chosen response, no reference model.

    m(y) = mean_t lp_t          z = beta * (m(y+) - m(y-)) - gamma
    L    = -(1 - eps) * log sigmoid(z) - eps * log sigmoid(-z) + nll_weight * NLL(y+)          eps = label_smoothing

The contrast is SimPO's (arXiv 2405.14734), the NLL is CPO's (arXiv 2401.08417). TRL's CPOTrainer computes this loss with
loss_type="simpo" and cpo_alpha = nll_weight, Liger's LigerFusedLinearSimPOLoss with compute_nll_loss=True and alpha =
nll_weight. By default the NLL is a mean over all chosen tokens of the batch, as in both (nll_reduce, see nll.py).
Reward: beta * m(y).
"""

from __future__ import annotations

from dataclasses import replace

from synpo_fast.losses.checks import check_choice, check_number
from synpo_fast.losses.nll import REDUCES, nll
from synpo_fast.losses.pair import LossOutput, PairLogprobs
from synpo_fast.losses.simpo import simpo


def cpo_simpo(
    policy: PairLogprobs,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    nll_weight: float = 1.0,
    nll_reduce: str = "batch_token_mean",
) -> LossOutput:
    """CPO-SimPO loss per pair, including its NLL. The log-probs in the output are means.

    A pair that is not compared keeps the NLL of its chosen response.
    Raises ValueError if beta <= 0, gamma is not finite, label_smoothing lies outside [0, 0.5), nll_weight < 0, or nll_reduce
    is unknown.
    """
    check_number("nll_weight", nll_weight, at_least=0.0)
    check_choice("nll_reduce", nll_reduce, REDUCES)
    output = simpo(policy, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return replace(output, losses=output.losses + nll_weight * nll(policy, reduce=nll_reduce))
