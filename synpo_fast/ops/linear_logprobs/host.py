"""Forward and backward of the host-driven backends (chunked, native): drop ignored rows, compute, scatter the results back.

Both backends supply the same two functions, which work on valid rows only. This file handles `rows` and ignored labels.
"""

from types import ModuleType

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.problem import Problem, valid_rows


def forward(backend: ModuleType, problem: Problem, want_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs [N] (0 where ignored) and, for the backward, normalisers [n, 2] and direction [n, D] (or [0, D])."""
    valid = valid_rows(problem)
    if valid.labels.numel() == 0:
        dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
        nothing = problem.hidden.new_empty(0, problem.hidden.shape[1])
        return (
            problem.hidden.new_zeros(problem.labels.shape, dtype=dtype),
            nothing.new_empty(0, 2, dtype=dtype),
            nothing,
        )
    hidden = valid.gather_hidden(problem)
    logps, normalisers, direction = backend.forward_rows(problem, hidden, valid.labels, want_direction)
    return valid.spread(logps, problem.labels.shape[0]), normalisers, direction


def backward(
    backend: ModuleType,
    problem: Problem,
    grad_logps: Tensor,
    logps: Tensor,
    normalisers: Tensor,
    direction: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden [M, D], weight and bias; None where `needs` is False. normalisers and direction may be padded."""
    valid = valid_rows(problem)
    count = valid.labels.numel()
    coefficients = valid.gather(grad_logps).contiguous()
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if needs[0]:
        scaled = torch.empty_like(direction[:count])
        torch.mul(direction[:count], coefficients[:, None], out=scaled)
        grad_hidden = valid.scatter_hidden(scaled, problem)
    if needs[1] or needs[2]:
        if count == 0:
            grad_weight = problem.weight.new_zeros(problem.weight.shape)
            grad_bias = problem.weight.new_zeros(problem.weight.shape[0])
        else:
            hidden = valid.gather_hidden(problem)
            grad_weight, grad_bias = backend.weight_grad_rows(
                problem, hidden, valid.labels, valid.gather(logps), normalisers[:count], coefficients, needs[2]
            )
    return grad_hidden, grad_weight if needs[1] else None, grad_bias if needs[2] else None
