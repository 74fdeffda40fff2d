"""Launches the kernels of triton_kernels.py: allocates, splits rows and vocabulary to meet a memory bound, never synchronises.

    prepare rows -> for each block of rows, for each strip of the vocabulary:
        exponentials of the logits -> update the rows' references and sums -> (with a gradient) add exponentials x W
    -> finish rows

Blocks of rows whose exponentials are kept have one strip, the whole vocabulary, and write it where it stays.
The host reads no tensor here, so a call can be captured in a CUDA graph.
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from synpo_fast.ops.linear_logprobs import triton_kernels as kernels
from synpo_fast.ops.linear_logprobs.problem import STATS, Computed, Problem, Wanted, direction_dtype
from synpo_fast.ops.linear_logprobs.triton_config import Cut, KernelConfig, Tile, cut_forward, kernel_config
from synpo_fast.ops.linear_logprobs.triton_support import capability, interpreting, tf32_allowed


@functools.cache
def num_programs(device: torch.device) -> int:
    """Number of programs in a persistent grid: one per multiprocessor."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def config_of(problem: Problem, weight: Tensor, stats: bool = False) -> KernelConfig:
    simple = problem.softcap is None and tma_fits(weight)
    config = kernel_config(problem.hidden.dtype, capability(problem.hidden.device), simple=simple, stats=stats)
    if stats and problem.softcap is not None and not config.copy_engine:
        # With wider tiles or fewer warps sm_80 spills 32 to 96 bytes.
        config = replace(config, logits=replace(config.logit_grads, num_warps=8))
    return config


def _limit(dtype: torch.dtype) -> float:
    """Largest allowed logit minus reference: e^limit must fit the dtype, and its sum over a vocabulary must fit fp32."""
    return 8.0 if dtype == torch.float16 else 60.0


def _headroom(dtype: torch.dtype) -> float:
    """Distance of the first reference below the target's logit. In fp16, the exponentials of a confident token's rivals would
    otherwise be below its smallest number; a rival more than _limit above that reference still raises it."""
    return 6.0 if dtype == torch.float16 else 0.0


def precision(dtype: torch.dtype) -> str:
    """Input precision of fp32 products: tf32 if torch allows it, otherwise full fp32."""
    return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"


def block_dim(dim: int) -> int:
    return min(1024, triton.next_power_of_2(dim))


def tma_fits(*tensors: Tensor) -> bool:
    """True if the copy engine can load the tensors: unit stride within rows, and rows that start at multiples of 16 bytes."""
    return all(
        t.stride(1) == 1 and t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors
    )


def operand(tensor: Tensor, rows: int, columns: int, tma: bool) -> Any:
    if not tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


class CompactedRows:
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
            HAS_SOFTCAP=problem.softcap is not None, BLOCK_D=block_dim(dim),
        )  # fmt: skip

    def compact(self, values: Tensor) -> Tensor:
        """Reorders [N] from the order of the labels: values of valid rows first, then zeros."""
        slot = torch.where(self.kept, self.place - 1, values.shape[0])
        return values.new_zeros(values.shape[0] + 1).scatter_(0, slot, values)[:-1]


def _vectors(number: int, length: int, device: torch.device) -> Tensor:
    """Uninitialised fp32 [number, length]; each vector starts on a 16-byte boundary, or Triton would compile for each length."""
    return torch.empty(number, -(-length // 4) * 4, dtype=torch.float32, device=device)[:, :length]


def _padded(length: int, dtype: torch.dtype) -> int:
    """Bytes of a buffer in a shared piece of memory, so that the next one starts on a boundary that the copy engine accepts."""
    return -(-length * dtype.itemsize // 128) * 128


def _carve(memory: Tensor, sizes: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Vectors of the given lengths and dtypes, one after another in `memory` (bytes)."""
    starts = itertools.accumulate((_padded(*size) for size in sizes[:-1]), initial=0)
    return [
        memory[start : start + length * dtype.itemsize].view(dtype)
        for start, (length, dtype) in zip(starts, sizes, strict=True)
    ]


def row_major(weight: Tensor) -> Tensor:
    return weight if weight.stride(1) == 1 else weight.contiguous()


def linear_logprobs_forward(problem: Problem, wanted: Wanted) -> Computed:
    """Computes the log-probs and what is wanted with them. Compacted results have room for all N rows.

    fp16 keeps no exponentials: its range does not hold both those of confident tokens and the target's entry, which can reach V.
    """
    with torch.cuda.device_of(problem.hidden):  # Triton launches on the current device, not on the tensors' device
        device, dtype = problem.hidden.device, problem.hidden.dtype
        num_labels, (vocabulary, dim) = problem.labels.shape[0], problem.weight.shape
        weight = row_major(problem.weight)
        config = config_of(problem, weight, wanted.stats)
        whole = -(-vocabulary // config.logits.columns) * config.logits.columns
        kept = 0 if dtype == torch.float16 else min(wanted.keep_rows, num_labels)
        computed = Computed(
            logps=torch.zeros(num_labels, dtype=torch.float32, device=device),
            normalisers=torch.zeros(num_labels, 2, dtype=torch.float32, device=device),
            direction=torch.empty(0, dim, dtype=direction_dtype(dtype, wanted.logsumexp_grad), device=device),
            exponentials=torch.empty(kept, whole, dtype=dtype, device=device),
            stats=torch.zeros(num_labels if wanted.stats else 0, len(STATS), dtype=torch.float32, device=device),
        )
        return _Forward(problem, weight, wanted, computed, config).run() if num_labels else computed


class _Forward:
    """One forward pass: its buffers, and the launches for a block of rows."""

    def __init__(
        self, problem: Problem, weight: Tensor, wanted: Wanted, computed: Computed, config: KernelConfig
    ) -> None:
        device, dtype = problem.hidden.device, problem.hidden.dtype
        num_labels, (self.vocabulary, self.dim) = problem.labels.shape[0], problem.weight.shape
        self.problem, self.wanted, self.config = problem, wanted, config
        self.weight, self.programs = weight, num_programs(device)
        kept, whole = computed.exponentials.shape
        self.cuts = cut_forward(num_labels, self.dim, self.vocabulary, dtype.itemsize, config, self.programs, kept)
        if interpreting():
            self.cuts = _small_cuts(num_labels, kept, self.vocabulary, config)
        if not wanted.direction:  # nothing reads a strip, so it is not stored and spans the vocabulary
            self.cuts = [replace(cut, columns=whole) for cut in self.cuts]
        self.rows = rows = CompactedRows(problem, self.weight, _headroom(dtype))
        # Directions overwrite the copied rows. In another dtype they are a tensor of their own, which also holds the sums.
        direction = rows.hidden if wanted.direction else computed.direction
        self.in_place = wanted.direction and computed.direction.dtype != dtype
        if self.in_place:
            direction = torch.empty(num_labels, self.dim, dtype=computed.direction.dtype, device=device)
        self.computed = replace(computed, direction=direction)
        self.moments: list[Tensor | None] = [None] * 3  # dots, best and squares of rows
        if wanted.stats:
            dots, best, squares = _vectors(3, num_labels, device).zero_()
            self.moments = [dots, best.fill_(-1e30), squares]

    def run(self) -> Computed:
        kept = self.computed.exponentials.shape[0]
        starts = list(itertools.accumulate((cut.rows for cut in self.cuts[:-1]), initial=0))
        buffers = [self._buffers(cut, first < kept) for cut, first in zip(self.cuts, starts, strict=True)]
        # All blocks use the same memory, each in its own way.
        most = max(sum(_padded(length, dtype) for length, dtype in sizes) for sizes in buffers)
        memory = torch.empty(most, dtype=torch.uint8, device=self.weight.device)
        for cut, first, sizes in zip(self.cuts, starts, buffers, strict=True):
            sums, strip, *tiles = _carve(memory, sizes)
            if self._sums_in_place(cut):
                sums = self.computed.direction[first : first + cut.rows]
            if first < kept:
                exponentials = self.computed.exponentials[first : first + cut.rows]
            else:
                exponentials = strip.view(cut.rows if self.wanted.direction else 0, cut.columns)
            self._block(first, cut, exponentials, sums, tiles, first < kept)
        return self.computed

    def _sums_in_place(self, cut: Cut) -> bool:
        return self.in_place and cut.splits == 1

    def _buffers(self, cut: Cut, is_kept: bool) -> list[tuple[int, torch.dtype]]:
        """Lengths and dtypes of a block's partial sums, strip of exponentials, and vectors of each tile's rows."""
        direction, fp32 = self.wanted.direction, torch.float32
        summed = cut.splits * cut.rows * self.dim if direction and not self._sums_in_place(cut) else 0
        stored = cut.rows * cut.columns if direction and not is_kept else 0
        tiles = cut.rows * cut.columns // self.config.logits.columns
        return [(summed, fp32), (stored, self.rows.hidden.dtype), *[(tiles, fp32)] * (5 if self.wanted.stats else 2)]

    def _block(
        self, first: int, cut: Cut, exponentials: Tensor, sums: Tensor, tiles: list[Tensor], is_kept: bool
    ) -> None:
        """Computes the rows [first, first + cut.rows). exponentials: those to keep, or memory for one strip, or of no rows."""
        problem, rows, config, computed = self.problem, self.rows, self.config, self.computed
        block, splits = cut.rows, cut.splits
        columns, stored = exponentials.shape[1], exponentials.shape[0] > 0
        tile_top, tile_sum, *tile_moments = tiles if self.wanted.stats else [*tiles, None, None, None]
        tma = config.copy_engine and tma_fits(rows.hidden, self.weight, *([exponentials] if stored else []))
        x = operand(rows.hidden, config.logits.rows, config.logits.depth, tma)
        w = operand(self.weight, config.logits.columns, config.logits.depth, tma)
        e_out = operand(exponentials, config.logits.rows, config.logits.columns, tma and stored)
        e_in = operand(exponentials, config.weighted.rows, config.weighted.depth, tma and stored)
        w_in = operand(self.weight, config.weighted.depth, config.weighted.columns, tma)
        numbers = (problem.logit_scale, problem.softcap or 0.0)
        has_softcap, stats = problem.softcap is not None, self.wanted.stats
        most_tiles = triton.next_power_of_2(computed.exponentials.shape[1] // config.logits.columns)
        for first_column in range(0, self.vocabulary, columns):
            kernels._exp_logits_forward_kernel[(self.programs,)](
                x, w, problem.bias, rows.labels, rows.top, e_out, tile_top, tile_sum, *tile_moments,
                rows.count, first, block, first_column, columns, self.vocabulary, self.dim, self.weight.stride(0),
                *numbers, self.programs,
                KEEP=stored, STATS=stats, HAS_BIAS=problem.bias is not None, HAS_SOFTCAP=has_softcap, TMA=tma,
                PRECISION=precision(rows.hidden.dtype), LIMIT=_limit(rows.hidden.dtype),
                BLOCK_N=config.logits.rows, BLOCK_V=config.logits.columns, BLOCK_D=config.logits.depth,
                GROUP=config.logits.group, **options(config.logits),
            )  # fmt: skip
            used = -(-min(columns, self.vocabulary - first_column) // config.logits.columns)
            kernels._settle_rows_kernel[(block,)](
                rows.top, rows.others, *self.moments, tile_top, tile_sum, *tile_moments,
                exponentials, sums, rows.count, first, block, columns, self.dim,
                used, splits if first_column and self.wanted.direction else 0,
                KEEP=stored, STATS=stats, BLOCK_T=most_tiles, BLOCK_V=config.logits.columns,
                BLOCK_D=block_dim(self.dim), num_warps=8,
            )  # fmt: skip
            if self.wanted.direction:
                kernels._weighted_rows_kernel[(self.programs,)](
                    e_in, w_in, sums, rows.count, first, block, first_column, columns, self.vocabulary, self.dim,
                    self.weight.stride(0), splits, self.programs,
                    FIRST=first_column == 0, SPLIT=splits > 1, TMA=tma,
                    PRECISION=precision(rows.hidden.dtype), BLOCK_N=config.weighted.rows,
                    BLOCK_D=config.weighted.columns, BLOCK_V=config.weighted.depth,
                    GROUP=config.weighted.group, **options(config.weighted),
                )  # fmt: skip
        # The copied rows of this block are not read again, so that directions may overwrite them.
        kernels._finish_rows_kernel[(problem.labels.shape[0],)](
            self.weight, problem.labels, rows.labels, rows.place, rows.target, rows.top, rows.others, *self.moments, sums,
            computed.logps, computed.normalisers, computed.direction, exponentials, computed.stats,
            first, block, columns, self.dim, splits, self.weight.stride(0), *numbers, problem.ignore_index,
            DIRECTION=self.wanted.direction, KEPT=is_kept, STATS=stats, HAS_SOFTCAP=has_softcap,
            BLOCK_D=block_dim(self.dim),
        )  # fmt: skip


def small_strip(vocabulary: int, config: KernelConfig) -> int:
    """Columns of a strip for the interpreter: several strips and partial sums even for the small vocabulary of a test."""
    return min(-(-vocabulary // (2 * config.logits.columns)) * 2, 4) * config.logits.columns


def _small_cuts(num_rows: int, kept: int, vocabulary: int, config: KernelConfig) -> list[Cut]:
    """Blocks for the interpreter: several even for the few rows of a test, with one and two partial sums by turns."""
    block, strip = 2 * config.logits.rows, small_strip(vocabulary, config)
    whole = -(-vocabulary // config.logits.columns) * config.logits.columns
    starts = [*range(0, kept, block), *range(kept, num_rows, block)]
    return [
        Cut(end - start, whole if start < kept else strip, 2 - index % 2)
        for index, (start, end) in enumerate(itertools.pairwise([*starts, num_rows]))
    ]
