"""Launches the kernels of triton_kernels.py: allocates, splits rows and vocabulary to meet a memory bound, never synchronises.

    prepare rows -> for each block of rows, for each strip of the vocabulary:
        exponentials of the logits -> update the rows' references and sums -> (with a gradient) add exponentials x W
    -> finish rows

The host reads no tensor here, so a call can be captured in a CUDA graph.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from synpo_fast.ops.linear_logprobs import triton_kernels as kernels
from synpo_fast.ops.linear_logprobs.problem import Problem
from synpo_fast.ops.linear_logprobs.triton_config import (
    Cut,
    KernelConfig,
    Tile,
    cut_forward,
    cut_weight_grad,
    kernel_config,
)
from synpo_fast.ops.linear_logprobs.triton_support import capability, interpreting, tf32_allowed


@functools.cache
def _num_programs(device: torch.device) -> int:
    """Number of programs in a persistent grid: one per multiprocessor."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _config(problem: Problem, weight: Tensor) -> KernelConfig:
    simple = problem.softcap is None and _tma_fits(weight)
    return kernel_config(problem.hidden.dtype, capability(problem.hidden.device), simple=simple)


def _limit(dtype: torch.dtype) -> float:
    """Largest allowed logit minus reference: e^limit must fit the dtype, and its sum over a vocabulary must fit fp32."""
    return 8.0 if dtype == torch.float16 else 60.0


def _headroom(dtype: torch.dtype) -> float:
    """Distance of the first reference below the target's logit. In fp16, the exponentials of a confident token's rivals would
    otherwise be below its smallest number; a rival more than _limit above that reference still raises it."""
    return 6.0 if dtype == torch.float16 else 0.0


def _precision(dtype: torch.dtype) -> str:
    """Input precision of fp32 products: tf32 if torch allows it, otherwise full fp32."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def _block_dim(dim: int) -> int:
    return min(1024, triton.next_power_of_2(dim))


def _tma_fits(*tensors: Tensor) -> bool:
    """True if the copy engine can load the tensors: unit stride within rows, and rows that start at multiples of 16 bytes."""
    return all(
        t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors
    )


def _operand(tensor: Tensor, rows: int, columns: int, tma: bool) -> Any:
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


class _Rows:
    """The compacted valid rows on the device: hidden [N, D], labels [N], target logits [N], and their number `count`."""

    def __init__(self, problem: Problem, weight: Tensor, headroom: float = 0.0) -> None:
        num_labels, dim = problem.labels.shape[0], weight.shape[1]
        hidden = problem.hidden if problem.hidden.stride(-1) == 1 else problem.hidden.contiguous()
        self.kept = problem.labels != problem.ignore_index
        self.place = torch.cumsum(self.kept, 0)
        self.count = self.place[-1:]
        self.hidden = torch.zeros(num_labels, dim, dtype=hidden.dtype, device=hidden.device)
        self.labels = torch.zeros_like(problem.labels)
        self.target, self.top, self.others = _vectors(3, num_labels, hidden.device).zero_()
        kernels._prepare_rows_kernel[(num_labels,)](
            hidden, weight, problem.bias, problem.labels, problem.rows, self.place,
            hidden.shape[0], weight.shape[0], dim, hidden.stride(0), weight.stride(0),
            problem.logit_scale, problem.softcap or 0.0, problem.ignore_index, headroom,
            self.hidden, self.labels, self.target, self.top, self.others,
            HAS_BIAS=problem.bias is not None, HAS_ROWS=problem.rows is not None,
            HAS_SOFTCAP=problem.softcap is not None, BLOCK_D=_block_dim(dim),
        )  # fmt: skip

    def compact(self, values: Tensor) -> Tensor:
        """Reorders [N] from the order of the labels: values of valid rows first, then zeros."""
        slot = torch.where(self.kept, self.place - 1, values.shape[0])
        return values.new_zeros(values.shape[0] + 1).scatter_(0, slot, values)[:-1]


def _vectors(number: int, length: int, device: torch.device) -> Tensor:
    """Uninitialised fp32 [number, length]; each vector starts on a 16-byte boundary, or Triton would compile for each length."""
    return torch.empty(number, -(-length // 4) * 4, dtype=torch.float32, device=device)[:, :length]


def _head(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def linear_logprobs_forward(problem: Problem, want_direction: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns log-probs [N] (0 where ignored), and normalisers [N, 2] and direction [N, D] (or [0, D]) of the compacted rows."""
    with torch.cuda.device_of(problem.hidden):  # Triton launches on the current device, not on the tensors' device
        return forward(problem, want_direction, keep_all=False)[:3]


def forward(problem: Problem, want_direction: bool, keep_all: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns linear_logprobs_forward and the exponentials: of the last strip, or with keep_all of all rows and columns."""
    device, dtype = problem.hidden.device, problem.hidden.dtype
    num_labels, (vocabulary, dim) = problem.labels.shape[0], problem.weight.shape
    logps = torch.zeros(num_labels, dtype=torch.float32, device=device)
    normalisers = torch.zeros(num_labels, 2, dtype=torch.float32, device=device)
    weight = _head(problem.weight)
    config, programs = _config(problem, weight), _num_programs(device)
    whole = -(-vocabulary // config.logits.columns) * config.logits.columns
    if num_labels == 0:
        nothing = torch.empty(0, dim, dtype=torch.float32 if dtype == torch.float16 else dtype, device=device)
        return logps, normalisers, nothing, problem.hidden.new_empty(0, whole)
    cut = cut_forward(num_labels, dim, vocabulary, dtype.itemsize, config, programs)
    if interpreting():
        cut = _small_cut(num_labels, vocabulary, config)
    if keep_all:
        cut = Cut(rows=num_labels, columns=whole, splits=cut.splits)
    columns = cut.columns if want_direction else whole
    tiles = columns // config.logits.columns
    # fp16 exponentials kept for dW must not exceed 1, or the factors c / b would fall below fp16's smallest number.
    limit = 0.0 if keep_all and dtype == torch.float16 else _limit(dtype)

    rows = _Rows(problem, weight, 0.0 if keep_all else _headroom(dtype))
    kept_rows = cut.rows if want_direction else 0
    exponentials = torch.empty(kept_rows, columns, dtype=dtype, device=device)
    if keep_all and problem.bias is not None:
        exponentials.zero_()  # the bias gradient sums over all rows, including the unused ones after the valid rows
    direction = rows.hidden
    if (
        dtype == torch.float16
    ):  # a confident token's direction is below fp16's smallest number until it meets the loss scale
        direction = torch.empty(num_labels if want_direction else 0, dim, dtype=torch.float32, device=device)
    sums_in_place = dtype == torch.float16 and cut.splits == 1
    sums = torch.empty(cut.splits, 0 if sums_in_place else kept_rows, dim, dtype=torch.float32, device=device)
    tile_top, tile_sum = _vectors(2, tiles * cut.rows, device)
    tma = config.copy_engine and _tma_fits(rows.hidden, weight) and (not want_direction or _tma_fits(exponentials))

    x, w = (
        _operand(t, r, config.logits.depth, tma)
        for t, r in ((rows.hidden, config.logits.rows), (weight, config.logits.columns))
    )
    e_out = _operand(exponentials, config.logits.rows, config.logits.columns, tma and want_direction)
    e_in = _operand(exponentials, config.weighted.rows, config.weighted.depth, tma and want_direction)
    w_in = _operand(weight, config.weighted.depth, config.weighted.columns, tma)
    shape = {"HAS_SOFTCAP": problem.softcap is not None, "KEEP": want_direction}
    for first_row in range(0, num_labels, cut.rows):
        block = min(cut.rows, num_labels - first_row)
        totals = direction[first_row : first_row + block] if sums_in_place else sums
        for first_column in range(0, vocabulary, columns):
            used = -(-min(columns, vocabulary - first_column) // config.logits.columns)
            kernels._exp_logits_forward_kernel[(programs,)](
                x, w, problem.bias, rows.labels, rows.top, e_out, tile_top, tile_sum, rows.count,
                first_row, block, first_column, columns, vocabulary, dim, weight.stride(0),
                problem.logit_scale, problem.softcap or 0.0, programs,
                HAS_BIAS=problem.bias is not None, TMA=tma, PRECISION=_precision(dtype), LIMIT=limit,
                BLOCK_N=config.logits.rows, BLOCK_V=config.logits.columns, BLOCK_D=config.logits.depth,
                GROUP=config.logits.group, **shape, **_options(config.logits),
            )  # fmt: skip
            kernels._settle_rows_kernel[(block,)](
                rows.top, rows.others, tile_top, tile_sum, exponentials, totals, rows.count,
                first_row, block, columns, dim, used, cut.splits if first_column else 0,
                KEEP=want_direction, BLOCK_T=triton.next_power_of_2(whole // config.logits.columns),
                BLOCK_V=config.logits.columns, BLOCK_D=_block_dim(dim),
            )  # fmt: skip
            if want_direction:
                kernels._weighted_rows_kernel[(programs,)](
                    e_in, w_in, totals, rows.count, first_row, block, first_column, columns, vocabulary, dim,
                    weight.stride(0), cut.splits, programs, FIRST=first_column == 0,
                    SPLIT=cut.splits > 1, TMA=tma, PRECISION=_precision(dtype),
                    BLOCK_N=config.weighted.rows, BLOCK_D=config.weighted.columns, BLOCK_V=config.weighted.depth,
                    GROUP=config.weighted.group, **_options(config.weighted),
                )  # fmt: skip
        # The valid rows of this block are not read again, so their directions overwrite them (in fp16 the sums).
        kernels._finish_rows_kernel[(num_labels,)](
            weight, problem.labels, rows.labels, rows.place, rows.target, rows.top, rows.others, totals,
            logps, normalisers, direction, exponentials, first_row, block, columns, dim, cut.splits, weight.stride(0),
            problem.logit_scale, problem.softcap or 0.0, problem.ignore_index,
            KEEP_ALL=keep_all, BLOCK_D=_block_dim(dim), **shape,
        )  # fmt: skip
    return logps, normalisers, direction if want_direction else direction.new_empty(0, dim), exponentials


def _small_cut(num_rows: int, vocabulary: int, config: KernelConfig) -> Cut:
    """Split for the interpreter: several blocks, strips and partial sums even for the few rows of a test."""
    strip = min(-(-vocabulary // (2 * config.logits.columns)) * 2, 4) * config.logits.columns
    return Cut(rows=min(num_rows, 2 * config.logits.rows), columns=strip, splits=2)


def linear_logprobs_backward(
    problem: Problem,
    grad_logps: Tensor,
    logps: Tensor,
    normalisers: Tensor,
    direction: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden [M, D], weight [V, D] and bias [V]; None where `needs` is False."""
    grad_hidden: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    if problem.labels.shape[0] == 0:
        grad_hidden = problem.hidden.new_zeros(problem.hidden.shape)
        grad_weight = problem.weight.new_zeros(problem.weight.shape)
        grad_bias = problem.weight.new_zeros(problem.weight.shape[0])
    else:
        with torch.cuda.device_of(problem.hidden):
            if needs[0]:
                grad_hidden = _hidden_grad(problem, grad_logps, direction)
            if needs[1] or needs[2]:
                grad_weight, grad_bias = _weight_grads(problem, grad_logps, logps, normalisers, needs[2])
    return (
        grad_hidden if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias if needs[2] else None,
    )


def _hidden_grad(problem: Problem, grad_logps: Tensor, direction: Tensor) -> Tensor:
    num_labels, dim = direction.shape
    place = torch.cumsum(problem.labels != problem.ignore_index, 0)
    scaled = torch.empty(direction.shape, dtype=problem.hidden.dtype, device=direction.device)
    kernels._scale_rows_backward_kernel[(num_labels,)](
        grad_logps, grad_logps.stride(0), direction, problem.labels, place, scaled, dim, problem.ignore_index,
        BLOCK_D=_block_dim(dim),
    )  # fmt: skip
    if problem.rows is None:
        return scaled
    grad_hidden = torch.zeros(problem.hidden.shape, dtype=scaled.dtype, device=scaled.device)
    # Ignored positions hold zeros, so their row index does not matter. A valid row out of range gave NaN in the forward.
    safe = problem.rows.clamp(0, problem.hidden.shape[0] - 1)
    return grad_hidden.index_add_(0, safe, scaled)


def _weight_grads(
    problem: Problem, grad_logps: Tensor, logps: Tensor, normalisers: Tensor, bias_grad: bool
) -> tuple[Tensor, Tensor | None]:
    device, dtype = problem.hidden.device, problem.hidden.dtype
    num_labels, (vocabulary, dim) = problem.labels.shape[0], problem.weight.shape
    weight = _head(problem.weight)
    config, programs = _config(problem, weight), _num_programs(device)
    rows = _Rows(problem, weight)
    columns = cut_weight_grad(num_labels, dim, vocabulary, dtype.itemsize, config)
    if interpreting():
        columns = _small_cut(num_labels, vocabulary, config).columns
    # Late in SynPO training a coefficient can be below fp16's smallest number, so the products use c / max |c|.
    coefficients = rows.compact(grad_logps.float())
    peak = coefficients.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    coefficients = coefficients / peak
    misses = rows.compact(-torch.expm1(logps))

    row_tiles = -(-num_labels // config.logit_grads.rows)
    logit_grads = torch.empty(row_tiles * config.logit_grads.rows, columns, dtype=dtype, device=device)
    grad_weight = torch.empty(vocabulary, dim, dtype=dtype, device=device)
    grad_bias = torch.empty(vocabulary, dtype=dtype, device=device) if bias_grad else None
    column_sums = torch.zeros(row_tiles if bias_grad else 0, columns, dtype=torch.float32, device=device)
    tma = config.copy_engine and _tma_fits(rows.hidden, weight, logit_grads)

    logits, grads = config.logit_grads, config.weight_grad
    x, w = _operand(rows.hidden, logits.rows, logits.depth, tma), _operand(weight, logits.columns, logits.depth, tma)
    g_out = _operand(logit_grads, logits.rows, logits.columns, tma)
    g_in, x_in = (
        _operand(logit_grads, grads.depth, grads.rows, tma),
        _operand(rows.hidden, grads.depth, grads.columns, tma),
    )
    for first_column in range(0, vocabulary, columns):
        kernels._logit_grads_backward_kernel[(programs,)](
            x, w, problem.bias, rows.labels, normalisers, misses, coefficients, g_out, column_sums, rows.count,
            num_labels, first_column, columns, vocabulary, dim, weight.stride(0),
            problem.logit_scale, problem.softcap or 0.0, programs,
            HAS_BIAS=problem.bias is not None, BIAS_GRAD=bias_grad, HAS_SOFTCAP=problem.softcap is not None,
            TMA=tma, PRECISION=_precision(dtype),
            BLOCK_N=logits.rows, BLOCK_V=logits.columns, BLOCK_D=logits.depth, GROUP=logits.group, **_options(logits),
        )  # fmt: skip
        _add_weight_grad(g_in, x_in, grad_weight, peak, rows.count, first_column, columns, grads, tma, programs)
        if grad_bias is not None:
            width = min(columns, vocabulary - first_column)
            grad_bias[first_column : first_column + width] = column_sums[:, :width].sum(0) * peak
    return grad_weight, grad_bias


def _add_weight_grad(
    logit_grads: Any, hidden: Any, grad_weight: Tensor, peak: Tensor, count: Tensor, first_column: int, columns: int,
    tile: Tile, tma: bool, programs: int,
) -> None:  # fmt: skip
    """Computes strip [first_column, first_column + columns) of grad_weight = peak * logit_grads^T hidden over the valid rows."""
    kernels._weight_grad_backward_kernel[(programs,)](
        logit_grads, hidden, grad_weight, peak, count, first_column, columns, *grad_weight.shape, programs,
        TMA=tma, PRECISION=_precision(grad_weight.dtype),
        BLOCK_V=tile.rows, BLOCK_D=tile.columns, BLOCK_N=tile.depth, GROUP=tile.group, **_options(tile),
    )  # fmt: skip


@dataclass
class KeptOnGPU:
    """Triton counterpart of kept.KeptLogprobs: rows are compacted on the device, and the host never reads their number."""

    problem: Problem
    logps: Tensor
    normalisers: Tensor
    direction: Tensor
    exponentials: Tensor

    def gradients(self, coefficients: Tensor, want_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of sum_n coefficients_n lp_n: to hidden [M, D], to weight [V, D] and, if wanted, to bias [V]."""
        with torch.cuda.device_of(coefficients):
            return self._gradients(coefficients, want_bias)

    def _gradients(self, coefficients: Tensor, want_bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        problem, dtype = self.problem, self.problem.hidden.dtype
        grad_weight = torch.empty(problem.weight.shape, dtype=dtype, device=problem.hidden.device)
        if problem.labels.shape[0] == 0:
            grad_bias = grad_weight.new_zeros(grad_weight.shape[0]) if want_bias else None
            return problem.hidden.new_zeros(problem.hidden.shape), grad_weight.zero_(), grad_bias
        weight = _head(problem.weight)
        config, programs = _config(problem, weight), _num_programs(problem.hidden.device)
        rows = _Rows(problem, weight)
        totals = self.normalisers[:, 1]
        factor = torch.where(totals > 0, -rows.compact(coefficients.float()) / totals, 0.0)
        if problem.softcap is None:
            factor = factor * problem.logit_scale
        # Late in SynPO training a coefficient can be below fp16's smallest number, so the product uses factor / max |factor|.
        peak = factor.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        factor = factor / peak
        scaled = (rows.hidden * factor[:, None]).to(dtype)
        tile, columns = config.weight_grad, self.exponentials.shape[1]
        tma = config.copy_engine and _tma_fits(scaled, self.exponentials)
        e = _operand(self.exponentials, tile.depth, tile.rows, tma)
        x = _operand(scaled, tile.depth, tile.columns, tma)
        _add_weight_grad(e, x, grad_weight, peak, rows.count, 0, columns, tile, tma, programs)
        grad_bias = None
        if want_bias:
            sums = torch.mm(factor[None].to(dtype), self.exponentials)[0, : grad_weight.shape[0]]
            grad_bias = (sums * peak).to(dtype)
        return _hidden_grad(problem, coefficients, self.direction), grad_weight, grad_bias


def linear_logprobs_kept_on_gpu(problem: Problem) -> KeptOnGPU:
    with torch.cuda.device_of(problem.hidden):
        return KeptOnGPU(problem, *forward(problem, True, keep_all=True))
