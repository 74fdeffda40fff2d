"""Tile sizes of the Triton kernels by GPU generation and dtype, and the split of a problem: fast, and within a memory bound.

The split is the one with the least time that triton_time_model.py predicts. Computing it takes about a millisecond of the
host's time; it is cached for each number of row tiles.

tests/ops/linear_logprobs compiles the kernels ahead of time with these sizes and checks the machine code: matrix instructions of
the generation, no spills, shared memory within the chip's limit. Tuning on hardware starts from these sizes.
"""

import functools
from dataclasses import dataclass, replace

import torch

from synpo_fast.ops.linear_logprobs.triton_time_model import (
    AMPERE,
    BLACKWELL,
    FILL,
    HOPPER,
    Chip,
    backward_time,
    ceil_div,
    forward_time,
    waves,
)

MIB = 2**20
MOST_ROWS = 4096  # of a block
MOST_SPLITS = 8
CANDIDATES = 8  # splits whose time is predicted in full


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product: rows x columns of the result, `depth` of the sum, `group` row tiles kept together in L2."""

    rows: int
    columns: int
    depth: int
    group: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class KernelConfig:
    logits: Tile  # hidden x W^T: rows are tokens, columns the vocabulary, depth D
    weighted: Tile  # exponentials x W: rows are tokens, columns D, depth the vocabulary
    logit_grads: Tile  # hidden x W^T again, in the backward
    weight_grad: Tile  # logit_grads^T x hidden: rows are the vocabulary, columns D, depth tokens
    chip: Chip  # rates with which the time of a split is predicted
    copy_engine: bool  # load operands through tensor descriptors; before Hopper these lose the software pipeline


def kernel_config(dtype: torch.dtype, capability: int, *, simple: bool = True) -> KernelConfig:
    """Tile sizes for a dtype and a compute capability (80, 90, 100, ...; 0: Triton's interpreter).

    The interpreter gets small tiles, so that small test problems span many of them.
    simple: True if the copy engine can load the operands and the logits have no softcap. Otherwise the widest tiles would
    need too many registers. Consumer Blackwell (120) has as little shared memory as the generation before Hopper.
    """
    if capability == 0:
        logits, weighted = Tile(16, 32, 16, 2, 1, 1), Tile(16, 16, 32, 2, 1, 1)
        return KernelConfig(logits, weighted, logits, Tile(32, 16, 16, 2, 1, 1), AMPERE, copy_engine=True)
    old = capability < 90 or capability >= 120
    chip = AMPERE if old else HOPPER if capability < 100 else BLACKWELL
    if dtype == torch.float32:
        small = Tile(64, 64, 32, 8, 4, 2)
        return KernelConfig(small, small, small, small, chip, copy_engine=not old)
    if old:
        tile = Tile(128, 128, 32, 8, 8, 3)
        return KernelConfig(tile, tile, Tile(128, 64, 32, 8, 4, 3), tile, chip, copy_engine=False)
    if not simple:
        tile = Tile(128, 128, 64, 8, 8, 3)
        return KernelConfig(tile, tile, tile, tile, chip, copy_engine=True)
    wide, deep, small = Tile(128, 256, 64, 8, 8, 3), Tile(128, 256, 64, 8, 8, 4), Tile(128, 128, 64, 8, 8, 4)
    if capability < 100:
        return KernelConfig(wide, deep, logit_grads=wide, weight_grad=deep, chip=chip, copy_engine=True)
    tall = Tile(256, 128, 64, 4, 8, 3)  # 128 x 256 spills here, see README.md
    return KernelConfig(
        tall, small, logit_grads=replace(small, num_stages=3), weight_grad=deep, chip=chip, copy_engine=True
    )


@dataclass(frozen=True)
class Cut:
    """Split of a problem: rows and vocabulary columns processed at a time, and partial sums per sum over the vocabulary."""

    rows: int
    columns: int
    splits: int


def cut_forward(
    num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, num_programs: int
) -> Cut:
    """Split of the forward pass with the least predicted time, within 5 % of full fp32 logits of extra memory for N >= 4096.

    The copied rows count as extra memory. With a small vocabulary (V < 12 D or so) they alone exceed 5 %; partial sums and one
    strip of exponentials may always take 48 MiB, and 96 MiB with fewer rows.
    """
    rounded = num_rows // 128 * 128 or num_rows  # so that nearby numbers of rows share a cached choice
    allowed = _allowed(rounded, dim, vocabulary, element_size, 48 if num_rows >= 4096 else 96)
    tiles = ceil_div(num_rows, _row_unit(config))
    cut = _best_cut(tiles, dim, vocabulary, element_size, config, num_programs, allowed)
    return Cut(min(cut.rows, num_rows), cut.columns, cut.splits)


def cut_weight_grad(
    num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, num_programs: int | None = None
) -> int:
    """Number of vocabulary columns whose logit gradients, for all rows, fit the same bound and take the least predicted time.

    num_programs: None for the multiprocessors of the generation's chip.
    """
    logits, grads = config.logit_grads, config.weight_grad
    num_programs = num_programs or config.chip.multiprocessors
    allowed = min(_allowed(num_rows, dim, vocabulary, element_size, 48 if num_rows >= 4096 else 64), 256 * MIB)
    widest = max(1, allowed // (num_rows * element_size * logits.columns))
    row_tiles = ceil_div(num_rows, logits.rows)
    grad_tiles = ceil_div(logits.columns, grads.rows) * ceil_div(dim, grads.columns)
    strips = _strip_tiles(widest, ceil_div(vocabulary, logits.columns), num_programs, row_tiles, grad_tiles)
    return min(
        (tiles * logits.columns for tiles in sorted(strips)),
        key=lambda width: backward_time(num_rows, dim, vocabulary, element_size, config, width, num_programs),
    )


def _allowed(num_rows: int, dim: int, vocabulary: int, element_size: int, least: int) -> int:
    """Bytes that may be held besides the copied rows: `least` MiB, or all that 5 % of full fp32 logits leave."""
    return max(least * MIB, num_rows * vocabulary * 4 // 20 - num_rows * dim * element_size)


def _row_unit(config: KernelConfig) -> int:
    """Number of rows in whole tiles of both products."""
    return max(config.logits.rows, config.weighted.rows)


@functools.lru_cache(maxsize=1024)
def _best_cut(
    row_tiles: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, programs: int, allowed: int
) -> Cut:
    """The split with the least predicted time among the most promising numbers of rows and partial sums."""
    unit, columns = _row_unit(config), config.logits.columns
    all_tiles = ceil_div(vocabulary, columns)
    candidates = []
    for block in range(1, min(row_tiles, MOST_ROWS // unit) + 1):
        rows = block * unit
        for splits in range(1, MOST_SPLITS + 1):
            left = min(allowed - splits * rows * dim * 4, 256 * MIB)
            widest = min(left // (rows * (columns * element_size + 8)), all_tiles)
            if widest >= 1 or splits == block == 1:
                cut = Cut(rows, max(1, widest) * columns, splits)
                candidates.append((_weighted_time(row_tiles * unit, dim, vocabulary, config, cut, programs), cut))
    candidates.sort(key=lambda candidate: candidate[0])
    cuts = [
        replace(cut, columns=tiles * columns)
        for _, cut in candidates[:CANDIDATES]
        for tiles in _strip_tiles(cut.columns // columns, all_tiles, programs, ceil_div(cut.rows, config.logits.rows))
    ]
    return min(
        cuts, key=lambda cut: forward_time(row_tiles * unit, dim, vocabulary, element_size, config, cut, programs)
    )


def _weighted_time(num_rows: int, dim: int, vocabulary: int, config: KernelConfig, cut: Cut, programs: int) -> float:
    """Rough time of the second product, which decides on rows and partial sums; the first fills its waves with any of them."""
    tile, chip = config.weighted, config.chip
    tiles = ceil_div(cut.rows, tile.rows) * ceil_div(dim, tile.columns) * cut.splits
    rest = ceil_div(num_rows % cut.rows, tile.rows) * ceil_div(dim, tile.columns) * cut.splits
    total = num_rows // cut.rows * waves(tiles, programs) + waves(rest, programs)
    strips = ceil_div(vocabulary, cut.columns)
    elements = tile.rows * tile.columns
    overhead = FILL / chip.clock + 8 * elements / chip.memory
    return total * (2 * elements * vocabulary / (cut.splits * chip.operations) + strips * overhead)


def _strip_tiles(widest: int, all_tiles: int, programs: int, *heights: int) -> set[int]:
    """Numbers of column tiles per strip worth a look: the most that fit, strips of equal width, and whole waves.

    heights: tiles of a product for each column tile of the strip.
    """
    widest = min(widest, all_tiles)
    equal = ceil_div(all_tiles, ceil_div(all_tiles, widest))
    whole = {height * widest // programs * programs // height for height in heights}
    return {widest, equal} | {tiles for tiles in whole if tiles}
