"""Log-probs that keep their exponentials, for losses that know the coefficients at once: 6*N*D*V with a trainable head.

`fused_linear_logprobs` must recompute the logits for the head's gradient (8*N*D*V), because autograd supplies the coefficients
c_n long after the logits were freed. A caller that can turn log-probs into coefficients immediately (a loss that holds complete
pairs) can keep E = exp(z - a) instead, which is V numbers per token:

    logits (2NDV) -> E -> E x W, the direction (2NDV) -> log-probs -> [caller: c] -> E^T x (c / b * hidden), dW (2NDV)

E is written once and read twice. The target's entry of E is replaced so that the last product alone gives all of dW.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs import chunked, linear_logprobs, native
from synpo_fast.ops.linear_logprobs.problem import Problem, ValidRows, valid_rows

LARGEST_FP16 = 65504


@dataclass
class KeptLogprobs:
    """Log-probs [N] (0 where ignored) with the kept exponentials; call `gradients` when the coefficients are known."""

    problem: Problem
    valid: ValidRows
    logps: Tensor
    normalisers: Tensor  # [n, 2]
    direction: Tensor  # [n, D]
    exponentials: Tensor  # [n, V]

    def gradients(self, coefficients: Tensor, want_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of sum_n coefficients_n lp_n: to hidden [M, D], to weight [V, D] and, if wanted, to bias [V]."""
        problem = self.problem
        c = self.valid.gather(coefficients)[:, None]
        scaled = torch.empty_like(self.direction)
        torch.mul(self.direction, c, out=scaled)
        grad_hidden = self.valid.scatter_hidden(scaled, problem)
        grad_weight, grad_bias = weight_grads_of_exponentials(
            problem, self.valid.gather_hidden(problem), self.normalisers, self.exponentials, c, want_bias
        )
        return grad_hidden, grad_weight, grad_bias


@dataclass
class RecomputedLogprobs:
    """Log-probs [N] without kept exponentials: `gradients` recomputes the logits."""

    problem: Problem
    backend: str
    logps: Tensor
    saved: tuple[Tensor, Tensor]  # normalisers, direction

    def gradients(self, coefficients: Tensor, want_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of sum_n coefficients_n lp_n: to hidden [M, D], to weight [V, D] and, if wanted, to bias [V]."""
        saved = (self.logps, *self.saved)
        grads = linear_logprobs.backward(self.problem, coefficients, saved, (True, True, want_bias), self.backend)
        assert grads[0] is not None and grads[1] is not None
        return grads[0], grads[1], grads[2]


def linear_logprobs_kept(problem: Problem, *, backend: str | None = None, keep: bool = True) -> Any:
    """Log-probs of a problem and all that their gradients need, without autograd. Backends: chunked, native, triton.

    Returns an object with `logps` [N] and `gradients(coefficients, want_bias)`. keep=False recomputes the logits.
    """
    chosen = linear_logprobs.choose_backend(problem.hidden, backend)
    if problem.hidden.dtype == torch.float16 and chosen != "native" and problem.weight.shape[0] > LARGEST_FP16:
        keep = False  # the target's entry can reach V, which fp16 cannot hold (the native backend keeps fp32)
    if not keep:
        logps, *saved = linear_logprobs.forward(problem, True, chosen)
        return RecomputedLogprobs(problem, chosen, logps, (saved[0], saved[1]))
    if chosen == "triton":
        from synpo_fast.ops.linear_logprobs.triton_launch import linear_logprobs_kept_on_gpu

        return linear_logprobs_kept_on_gpu(problem)
    module = {"chunked": chunked, "native": native}[chosen]
    valid = valid_rows(problem)
    hidden = valid.gather_hidden(problem)
    logps, normalisers, direction, exponentials = module.forward_rows_kept(problem, hidden, valid.labels)
    return KeptLogprobs(
        problem, valid, valid.spread(logps, problem.labels.shape[0]), normalisers, direction, exponentials
    )


def weight_grads_of_exponentials(
    problem: Problem, hidden: Tensor, normalisers: Tensor, exponentials: Tensor, c: Tensor, want_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Returns dW = E^T x (factor * hidden) and db; factor = -c / b (times logit_scale where E lacks the slope), c is [n, 1]."""
    factor = -c / normalisers[:, 1:]
    if problem.softcap is None:
        factor = factor * problem.logit_scale
    # Late in SynPO training a coefficient can be below fp16's smallest number, so the product uses factor / max |factor|.
    peak = factor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny) if factor.numel() else factor.new_ones(())
    factor = factor / peak
    grad = torch.mm(exponentials.t(), (hidden * factor).to(exponentials.dtype))
    grad_weight = grad.mul_(peak).to(problem.weight.dtype)
    if not want_bias:
        return grad_weight, None
    grad_bias = (factor.to(exponentials.dtype).t() @ exponentials).squeeze(0)
    return grad_weight, grad_bias.mul_(peak).to(problem.weight.dtype)
