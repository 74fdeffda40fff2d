"""Autograd of the op: what is saved between forward and backward, and the gradient through logsumexp."""

import torch
from torch import Tensor

from synpo_fast.ops.linear_logprobs.autocast import without_autocast
from synpo_fast.ops.linear_logprobs.backends import backward, choose_at_run_time, forward
from synpo_fast.ops.linear_logprobs.problem import STATS, Computed, Problem
from synpo_fast.ops.linear_logprobs.traced import is_traced, traced_backward, traced_forward


class LinearLogprobs(torch.autograd.Function):
    """Autograd of the op. Returns log-probs [N], logsumexp [N] and the other columns of STATS [N, 3], which carry no gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows, logit_scale, softcap, ignore_index, wanted, backend):
        ctx.set_materialize_grads(False)
        if is_traced(hidden):
            arguments = (hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
            computed = Computed(*traced_forward(*arguments, *vars(wanted).values(), backend))
        else:
            # A graph break between the choice of the backend and this call leaves "auto" here.
            backend = choose_at_run_time(hidden, backend)
            problem = Problem(hidden, weight, labels, bias, rows, logit_scale, softcap, ignore_index)
            computed = forward(problem, wanted, backend)
        logps = computed.logps
        logsumexp = computed.stats[:, 0].clone() if wanted.stats else torch.zeros_like(logps)
        others = computed.stats[:, 1:].clone()
        if any(ctx.needs_input_grad[:3]):
            # A frozen head's backward needs the shape of hidden only, and weight for the gradient of logsumexp.
            trained = any(ctx.needs_input_grad[1:3])
            ctx.save_for_backward(
                hidden if trained else _shape_only(hidden),
                weight if trained or wanted.logsumexp_grad else _shape_only(weight),
                bias, labels, rows, logps, logsumexp, computed.normalisers, computed.direction, computed.exponentials,
            )  # fmt: skip
        ctx.options, ctx.backend, ctx.logsumexp_grad = (
            (logit_scale, softcap, ignore_index),
            backend,
            wanted.logsumexp_grad,
        )
        # One call: a second one would replace the first.
        ctx.mark_non_differentiable(*([others] if wanted.logsumexp_grad else [logsumexp, others]))
        return logps, logsumexp, others

    @staticmethod
    def backward(ctx, grad_logps, grad_logsumexp, _):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "fused_linear_logprobs can be differentiated once, and create_graph=True asks for more; "
                "use backend='reference' for higher derivatives"
            )
        hidden, weight, bias, labels, rows, logps, logsumexp, normalisers, direction, exponentials = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        coefficients = torch.zeros_like(logps) if grad_logps is None else grad_logps
        grad_logsumexp = grad_logsumexp if ctx.logsumexp_grad else None
        if grad_logsumexp is not None:
            coefficients = coefficients - grad_logsumexp
        problem = Problem(hidden, weight, labels, bias, rows, *ctx.options)
        computed = Computed(logps, normalisers, direction, exponentials, logps.new_empty(0, len(STATS)))
        with without_autocast(hidden):
            if is_traced(hidden):
                tensors = (hidden, weight, labels, bias, rows, logps, normalisers, direction, exponentials)
                grads = traced_backward(coefficients, *tensors, *ctx.options, *needs, ctx.backend)
                grads = tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
            else:
                grads = backward(problem, coefficients, computed, needs, choose_at_run_time(hidden, ctx.backend))
            if grad_logsumexp is not None:
                grads = _add_target_terms(problem, grads, grad_logsumexp, logps + logsumexp)
        grads = (None if grads[0] is None else grads[0].to(hidden.dtype), *grads[1:])
        return *grads, None, None, None, None, None, None, None


def _add_target_terms(
    problem: Problem, grads: tuple[Tensor | None, ...], c: Tensor, target_logits: Tensor
) -> tuple[Tensor | None, ...]:
    """Adds the gradient of sum_n c_n z_n[y_n], the target logits, to the gradients of hidden, weight and bias."""
    counted = problem.labels != problem.ignore_index
    slope = torch.where(counted, c * problem.slope(target_logits), 0.0)[:, None]
    # On a GPU an index out of range gave NaN in the forward; here it must only stay inside the tensors.
    labels = torch.where(counted, problem.labels, 0).clamp(0, problem.weight.shape[0] - 1)
    rows = torch.arange(labels.shape[0], device=labels.device) if problem.rows is None else problem.rows
    rows = torch.where(counted, rows, 0).clamp(0, max(0, problem.hidden.shape[0] - 1))
    if labels.shape[0] == 0:
        return grads
    hidden, weight, bias = grads
    if hidden is not None:
        terms = slope * problem.weight[labels].to(slope.dtype)
        hidden.index_add_(0, rows, terms.to(hidden.dtype))
    if weight is not None:
        words, sums = _summed_over_equal(labels, slope * problem.hidden[rows].to(slope.dtype))
        weight.index_add_(0, words, sums.to(weight.dtype))
    if bias is not None:
        words, sums = _summed_over_equal(labels, slope)
        bias = bias.to(slope.dtype).index_add_(0, words, sums.squeeze(1)).to(bias.dtype)
    return hidden, weight, bias


def _shape_only(tensor: Tensor) -> Tensor:
    """A tensor with the same shape, dtype and device that takes the memory of one element."""
    return tensor.new_zeros(()).expand(tensor.shape)


def _summed_over_equal(labels: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the rows of terms [N, D] that have equal labels [N], in fp32: a 16-bit sum would lose a frequent word's small terms.

    Returns [N] labels and [N, D] sums. Unused places hold label 0 and zeros, so that no shape depends on values, and a GPU
    is not waited for.
    """
    ordered, order = labels.sort()
    place = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).cumsum(0)])
    sums = torch.zeros_like(terms).index_add_(0, place, terms[order])
    return torch.zeros_like(labels).scatter_(0, place, ordered), sums
