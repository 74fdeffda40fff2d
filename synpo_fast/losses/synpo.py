"""SynPO (arXiv 2506.00835): a contrast of geometric means, and the chosen response's own likelihood.

    G(y) = exp(mean_t lp_t)          A(y) = mean_t exp(lp_t)
    x    = alpha * (G(y+) - G(y-))
    L    = -sigmoid(x) - beta * A(y+)            link="sigmoid", the authors' code
    L    = -log sigmoid(x) - beta * A(y+)        link="logsigmoid", another published form

There is no reference model. The reward is G(y), so margins lie in [-1, 1]. With s = sigmoid(x), and w = s * (1 - s) or, for
the logsigmoid link, w = 1 - s, the gradient with respect to token log-probs is

    dL/dlp_t (chosen)   = -(alpha * w * G(y+) + beta * exp(lp_t)) / T+
    dL/dlp_t (rejected) =   alpha * w * G(y-) / T-

1 - s is computed as sigmoid(-x), never as a subtraction. Late in training w is far below the rounding error of s (1e-13 at
x = 30), and a subtraction or 16-bit arithmetic would give 0 for the whole response.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from synpo_fast.losses.checks import check_choice, check_number
from synpo_fast.losses.pair import LossOutput, PairLogprobs, compared_pairs, preference_output
from synpo_fast.losses.segments import (
    arithmetic_mean,
    geometric_mean,
    per_token,
    segment_lengths,
    segment_mean,
    upcast,
)

LINKS = ("sigmoid", "logsigmoid")


def synpo(policy: PairLogprobs, *, alpha: float = 30.0, beta: float = 0.2, link: str = "sigmoid") -> LossOutput:
    """SynPO loss per pair. The log-probs in the output are means.

    Raises ValueError if alpha <= 0, beta < 0, or link is neither "sigmoid" nor "logsigmoid".
    """
    check_synpo_options(alpha, beta, link)
    chosen_logps = segment_mean(policy.chosen, policy.chosen_offsets)
    rejected_logps = segment_mean(policy.rejected, policy.rejected_offsets)
    G_chosen, G_rejected = chosen_logps.exp(), rejected_logps.exp()
    A_chosen = arithmetic_mean(policy.chosen, policy.chosen_offsets)
    x = alpha * (G_chosen - G_rejected)
    return preference_output(
        policy,
        -link_function(x, link) - beta * A_chosen,
        chosen_rewards=G_chosen,
        rejected_rewards=G_rejected,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )


@torch.no_grad()
def synpo_token_coefficients(
    policy: PairLogprobs,
    *,
    alpha: float = 30.0,
    beta: float = 0.2,
    link: str = "sigmoid",
    num_pairs: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient d(sum of losses / num_pairs) / dlp_t in closed form: fp32 (fp64 for fp64 inputs) [Nc] and [Nr].

    Tokens of a pair that is not compared get 0.

    num_pairs: the divisor. None uses the number of pairs in this batch; 1 gives the gradient of each pair's own loss.
    """
    check_synpo_options(alpha, beta, link)
    num_pairs = policy.num_pairs if num_pairs is None else num_pairs
    check_number("num_pairs", num_pairs, above=0)
    G_chosen = geometric_mean(policy.chosen, policy.chosen_offsets)
    G_rejected = geometric_mean(policy.rejected, policy.rejected_offsets)
    x = alpha * (G_chosen - G_rejected)
    w = torch.sigmoid(x) * torch.sigmoid(-x) if link == "sigmoid" else torch.sigmoid(-x)
    compared = compared_pairs(policy).to(w.dtype) / num_pairs
    per_chosen = compared / segment_lengths(policy.chosen_offsets).clamp(min=1)
    per_rejected = compared / segment_lengths(policy.rejected_offsets).clamp(min=1)

    num_chosen, num_rejected = policy.chosen.shape[0], policy.rejected.shape[0]
    contrast = per_token(alpha * w * G_chosen * per_chosen, policy.chosen_offsets, num_chosen)
    language = beta * per_token(per_chosen, policy.chosen_offsets, num_chosen) * upcast(policy.chosen).exp()
    rejected = per_token(alpha * w * G_rejected * per_rejected, policy.rejected_offsets, num_rejected)
    return -(contrast + language), rejected


def link_function(x: Tensor, link: str) -> Tensor:
    """sigmoid(x) or log sigmoid(x), by the name in `link`.

    The sigmoid's autograd gradient keeps its relative precision, because the selected sigmoid is at most 1/2.
    """
    if link == "logsigmoid":
        return F.logsigmoid(x)
    return torch.where(x >= 0, 1.0 - torch.sigmoid(-x), torch.sigmoid(x))


def check_synpo_options(alpha: float, beta: float, link: str) -> None:
    """Raises ValueError if alpha <= 0, beta < 0, or link is not one of LINKS."""
    check_number("alpha", alpha, above=0.0)
    check_number("beta", beta, at_least=0.0)
    check_choice("link", link, LINKS)
