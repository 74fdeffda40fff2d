"""Launches the kernels of triton_backward_kernels.py. As in the forward, the host reads no tensor.

hidden: each row's direction times its coefficient
head:   dW = E^T (factor * hidden) over the rows whose exponentials E were kept
           + (c (onehot - softmax))^T hidden over the others, whose logits are computed again, strip by strip
"""

import torch
import triton
from torch import Tensor

from synpo_fast.ops.linear_logprobs import triton_backward_kernels as kernels
from synpo_fast.ops.linear_logprobs import triton_launch
from synpo_fast.ops.linear_logprobs.problem import Computed, Problem
from synpo_fast.ops.linear_logprobs.triton_config import cut_weight_grad
from synpo_fast.ops.linear_logprobs.triton_launch import (
    CompactedRows,
    block_dim,
    config_of,
    operand,
    options,
    precision,
    row_major,
    small_strip,
    tma_fits,
)
from synpo_fast.ops.linear_logprobs.triton_support import interpreting


def linear_logprobs_backward(
    problem: Problem, grad_logps: Tensor, computed: Computed, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden [M, D] (in the direction's dtype), weight [V, D] and bias [V]; None where `needs` is False."""
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if problem.labels.shape[0] == 0:
        grad_hidden = problem.hidden.new_zeros(problem.hidden.shape, dtype=computed.direction.dtype)
        grad_weight = problem.weight.new_zeros(problem.weight.shape)
        grad_bias = problem.weight.new_zeros(problem.weight.shape[0])
    else:
        with torch.cuda.device_of(problem.hidden):
            if needs[0]:
                grad_hidden = _hidden_grad(problem, grad_logps, computed.direction)
            if needs[1] or needs[2]:
                grad_weight, grad_bias = _HeadGrads(problem, grad_logps, computed, needs[2]).run()
    return (
        grad_hidden if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
    )


def _hidden_grad(problem: Problem, grad_logps: Tensor, direction: Tensor) -> Tensor:
    num_labels, dim = direction.shape
    place = torch.cumsum(problem.labels != problem.ignore_index, 0)
    scaled = torch.empty_like(direction)
    kernels._scale_rows_backward_kernel[(num_labels,)](
        grad_logps, grad_logps.stride(0), direction, problem.labels, place, scaled, dim, problem.ignore_index,
        BLOCK_D=block_dim(dim),
    )  # fmt: skip
    if problem.rows is None:
        return scaled
    grad_hidden = torch.zeros(problem.hidden.shape, dtype=direction.dtype, device=direction.device)
    # Ignored positions hold zeros, so their row index does not matter. A valid row out of range gave NaN in the forward.
    safe = problem.rows.clamp(0, problem.hidden.shape[0] - 1)
    return grad_hidden.index_add_(0, safe, scaled)


class _HeadGrads:
    """The gradients of the head: the compacted rows with their coefficients, and the launches for each strip."""

    def __init__(self, problem: Problem, grad_logps: Tensor, computed: Computed, bias_grad: bool) -> None:
        self.problem, self.computed, self.bias_grad = problem, computed, bias_grad
        self.weight = row_major(problem.weight)
        self.config = config_of(problem, self.weight)
        self.programs = triton_launch.num_programs(problem.hidden.device)
        self.rows = CompactedRows(problem, self.weight)
        self.kept = min(computed.exponentials.shape[0], problem.labels.shape[0])
        coefficients = self.rows.compact(grad_logps.float())
        self.misses = self.rows.compact(-torch.expm1(computed.logps))
        # Late in SynPO training c (1 - p), the largest entry of a row of the logits' gradient, can be below fp16's smallest
        # number. So the products use c / peak, and the sums are multiplied by peak.
        largest = (coefficients * self.misses).abs().amax()
        self.peak = largest.clamp_min(coefficients.abs().amax() * 2.0**-40).clamp_min(torch.finfo(torch.float32).tiny)
        self.coefficients = coefficients / self.peak

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Returns the gradients of weight [V, D] and, if wanted, of bias [V]."""
        problem, (vocabulary, dim) = self.problem, self.weight.shape
        device, dtype = problem.hidden.device, problem.hidden.dtype
        rest = problem.labels.shape[0] - self.kept
        columns = (
            cut_weight_grad(rest, dim, vocabulary, dtype.itemsize, self.config, self.programs) if rest else vocabulary
        )
        if interpreting() and rest:
            columns = small_strip(vocabulary, self.config)
        # Whole row tiles: the next product reads the rows after the last valid one, which then hold zeros.
        row_tiles = -(-rest // self.config.logit_grads.rows)
        logit_grads = torch.empty(row_tiles * self.config.logit_grads.rows, columns, dtype=dtype, device=device)
        column_sums = torch.zeros(row_tiles if self.bias_grad else 0, columns, dtype=torch.float32, device=device)
        grad_weight = torch.empty(vocabulary, dim, dtype=dtype, device=device)
        factors = self._factors()
        scaled = torch.empty(self.kept, dim, dtype=dtype, device=device)
        torch.mul(self.rows.hidden[: self.kept], factors[:, None], out=scaled)
        grad_bias = self._kept_bias_grad(factors) if self.bias_grad else None
        for first_column in range(0, vocabulary, columns):
            if rest:
                self._logit_grads(logit_grads, column_sums, first_column)
            self._add_products(scaled, logit_grads, grad_weight, first_column)
            if grad_bias is not None:
                part = grad_bias[first_column : first_column + columns]
                part += column_sums[:, : part.shape[0]].sum(0)
        return grad_weight, None if grad_bias is None else (grad_bias * self.peak).to(dtype)

    def _factors(self) -> Tensor:
        """The factors [kept] of kept rows: -c / b, times logit_scale where the exponentials lack it; 0 after the valid rows."""
        totals = self.computed.normalisers[: self.kept, 1]
        factors = torch.where(totals > 0, -self.coefficients[: self.kept] / totals, 0.0)
        return factors if self.problem.softcap is not None else factors * self.problem.logit_scale

    def _kept_bias_grad(self, factors: Tensor) -> Tensor:
        exponentials, vocabulary = self.computed.exponentials, self.weight.shape[0]
        grad_bias = torch.zeros(vocabulary, dtype=torch.float32, device=factors.device)
        if self.kept:
            kernels._kept_bias_grad_backward_kernel[(triton.cdiv(vocabulary, 128),)](
                exponentials, factors, grad_bias, self.rows.count, self.kept, exponentials.stride(0), vocabulary,
                BLOCK_N=16, BLOCK_V=128,
            )  # fmt: skip
        return grad_bias

    def _logit_grads(self, logit_grads: Tensor, column_sums: Tensor, first_column: int) -> None:
        """Computes c (onehot - softmax) z' / peak of one strip, for the rows whose exponentials were not kept."""
        problem, rows, tile = self.problem, self.rows, self.config.logit_grads
        tma = self.config.copy_engine and tma_fits(rows.hidden, self.weight, logit_grads)
        kernels._logit_grads_backward_kernel[(self.programs,)](
            operand(rows.hidden, tile.rows, tile.depth, tma), operand(self.weight, tile.columns, tile.depth, tma),
            problem.bias, rows.labels, self.computed.normalisers, self.misses, self.coefficients,
            operand(logit_grads, tile.rows, tile.columns, tma), column_sums, rows.count, self.kept,
            problem.labels.shape[0] - self.kept, first_column, logit_grads.shape[1], *self.weight.shape,
            self.weight.stride(0), problem.logit_scale, problem.softcap or 0.0, self.programs,
            HAS_BIAS=problem.bias is not None, BIAS_GRAD=self.bias_grad, HAS_SOFTCAP=problem.softcap is not None,
            TMA=tma, PRECISION=precision(logit_grads.dtype),
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_D=tile.depth, GROUP=tile.group, **options(tile),
        )  # fmt: skip

    def _add_products(self, scaled: Tensor, logit_grads: Tensor, grad_weight: Tensor, first_column: int) -> None:
        """Computes one strip of dW: kept exponentials and recomputed gradients in one fp32 sum, which is rounded once."""
        tile, exponentials, hidden = self.config.weight_grad, self.computed.exponentials, self.rows.hidden
        has_rest = logit_grads.shape[0] > 0
        operands = [(exponentials, tile.rows), (scaled, tile.columns)] if self.kept else []
        operands += [(logit_grads, tile.rows), (hidden, tile.columns)] if has_rest else []
        tma = self.config.copy_engine and tma_fits(*(tensor for tensor, _ in operands))
        loaded = [operand(tensor, tile.depth, columns, tma) for tensor, columns in operands]
        if not self.kept:
            loaded = [None, None, *loaded]
        if not has_rest:
            loaded = [*loaded, None, None]
        kernels._weight_grad_backward_kernel[(self.programs,)](
            *loaded, grad_weight, self.peak, self.rows.count, self.kept, first_column, logit_grads.shape[1],
            exponentials.shape[1], *grad_weight.shape, self.programs,
            KEPT=self.kept > 0, REST=has_rest, TMA=tma, PRECISION=precision(grad_weight.dtype),
            BLOCK_V=tile.rows, BLOCK_D=tile.columns, BLOCK_N=tile.depth, GROUP=tile.group, **options(tile),
        )  # fmt: skip
