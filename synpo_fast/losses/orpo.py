"""ORPO (arXiv 2403.07691): NLL on the chosen response plus a log odds ratio, no reference model.

    m(y)    = mean_t lp_t          odds(y) = exp(m) / (1 - exp(m))
    L       = NLL(y+) - beta * log sigmoid(log odds(y+) - log odds(y-))

beta is the paper's lambda. The odds use means of log-probs. By default the NLL is a mean over all chosen tokens of the batch,
as in the authors' code, Liger and TRL (nll_reduce, see nll.py). In TRL it also covers the prompt; here and in Liger it covers
only the response. Reward: beta * m(y).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.losses.checks import check_choice, check_number
from synpo_fast.losses.nll import REDUCES, nll
from synpo_fast.losses.pair import LossOutput, PairLogprobs, preference_output
from synpo_fast.losses.segments import segment_mean

# The odds are infinite at m = 0. The fp32 log-prob of a certain token rounds to 0, and an empty response has m = 0 before it is
# masked. 2^-24 is the rounding error of 1 in fp32.
_MAX_MEAN_LOGP = -(2.0**-24)


def orpo(policy: PairLogprobs, *, beta: float = 0.1, nll_reduce: str = "batch_token_mean") -> LossOutput:
    """ORPO loss per pair, including its NLL. The log-probs in the output are means.

    A pair that is not compared keeps the NLL of its chosen response.
    Raises ValueError if beta < 0 or nll_reduce is unknown.
    """
    check_number("beta", beta, at_least=0.0)
    check_choice("nll_reduce", nll_reduce, REDUCES)
    chosen_logps = segment_mean(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_mean(policy.rejected, policy.rejected_offsets)
    log_odds_ratio = _log_odds(chosen_logps) - _log_odds(rejected_logps)
    output = preference_output(
        policy,
        -beta * F.logsigmoid(log_odds_ratio),
        chosen_rewards=beta * chosen_logps,
        rejected_rewards=beta * rejected_logps,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )
    return replace(output, losses=output.losses + nll(policy, reduce=nll_reduce))


def _log_odds(m: Tensor) -> Tensor:
    m = m.clamp(max=_MAX_MEAN_LOGP)
    return m - torch.log(-torch.expm1(m))
