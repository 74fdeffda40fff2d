"""Tile sizes of the Triton kernels by GPU generation and dtype, and the split of a problem: fast, and within a memory bound.

The split is the one with the least time that triton_time_model.py predicts. Computing it takes about a millisecond on the
host; it is cached for each number of row tiles.

tests/ops/linear_logprobs compiles the kernels ahead of time with these sizes and checks the machine code: matrix instructions of
the generation, no spills, shared memory within the chip's limit. Tuning on hardware starts from these sizes.
"""

import functools
import math
from collections.abc import Sequence
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
CANDIDATES = 8  # sizes of blocks whose time is predicted in full


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


def kernel_config(dtype: torch.dtype, capability: int, *, simple: bool = True, stats: bool = False) -> KernelConfig:
    """Tile sizes for a dtype and a compute capability (80, 90, 100, ...; 0: Triton's interpreter).

    The interpreter gets small tiles, so that small test problems span many of them.
    simple: True if the copy engine can load the operands and the logits have no softcap. Otherwise the widest tiles would
    need too many registers. stats: the logits' kernel also computes statistics.
    Consumer Blackwell (120) has as little shared memory as the generation before Hopper.
    """
    if capability == 0:
        logits, weighted = Tile(16, 32, 16, 2, 1, 1), Tile(16, 16, 32, 2, 1, 1)
        return KernelConfig(logits, weighted, logits, Tile(32, 16, 16, 2, 1, 1), AMPERE, copy_engine=True)
    old = capability < 90 or capability >= 120
    chip = AMPERE if old else HOPPER if capability < 100 else BLACKWELL
    if dtype == torch.float32:
        small = Tile(64, 64, 32, 8, 8 if chip is BLACKWELL else 4, 2)  # 4 warps spill up to 48 bytes on sm_100
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
    tall, shallow = Tile(256, 128, 64, 4, 8, 3), replace(small, num_stages=3)  # 128 x 256 spills here, see README.md
    logits = shallow if stats else tall
    return KernelConfig(logits, small, logit_grads=shallow, weight_grad=deep, chip=chip, copy_engine=True)


@dataclass(frozen=True)
class Cut:
    """A block of rows: how many, vocabulary columns processed at a time, and partial sums per sum over the vocabulary."""

    rows: int
    columns: int
    splits: int


def cut_forward(
    num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, num_programs: int, kept: int = 0
) -> list[Cut]:
    """Blocks of rows, in order, with the least predicted time, within 5 % of full fp32 logits of extra memory for N >= 4096.

    kept: number of first rows whose exponentials are kept; their blocks have all columns, and their exponentials do not count.
    The copied rows count as extra memory. With a small vocabulary (V < 12 D or so) they alone exceed 5 %; partial sums and one
    strip of exponentials may always take 48 MiB, and 96 MiB with fewer rows.
    """
    rounded = num_rows // 128 * 128 or num_rows  # so that nearby numbers of rows share a cached choice
    allowed = _allowed(rounded, dim, vocabulary, element_size, 48 if num_rows >= 4096 else 96)
    cuts: list[Cut] = []
    for rows, whole in ((kept, True), (num_rows - kept, False)):
        if rows:
            tiles = ceil_div(rows, _row_unit(config))
            *full, last = _Blocks(dim, vocabulary, element_size, config, num_programs, allowed, whole).best(tiles)
            cuts += [*full, replace(last, rows=rows - sum(cut.rows for cut in full))]
    return cuts


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


@dataclass(frozen=True)
class _Blocks:
    """Search for blocks of rows with the least predicted time. whole: each block has all columns."""

    dim: int
    vocabulary: int
    element_size: int
    config: KernelConfig
    programs: int
    allowed: int
    whole: bool

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (instances are small and compare by value)
    def best(self, row_tiles: int) -> tuple[Cut, ...]:
        """Equal blocks of whole tiles, and one for the rest, among the most promising numbers of tiles."""
        most = min(row_tiles, max(1, MOST_ROWS // _row_unit(self.config)))
        rough = [0.0] + [
            min((time for time, _, _ in self._roughly(tiles)), default=math.inf) for tiles in range(1, most + 1)
        ]

        def total(tiles: int) -> float:
            return row_tiles // tiles * rough[tiles] + rough[row_tiles % tiles]

        fitting = [tiles for tiles in range(1, most + 1) if total(tiles) < math.inf]
        promising = sorted(fitting, key=total)[:CANDIDATES]
        sizes = [[tiles] * (row_tiles // tiles) + [row_tiles % tiles] * (row_tiles % tiles > 0) for tiles in promising]
        return min((tuple(self._block(tiles) for tiles in size) for size in sizes), key=self._time)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _block(self, row_tiles: int) -> Cut:
        """One block of rows: its partial sums and strips."""
        logits = self.config.logits
        height = ceil_div(row_tiles * _row_unit(self.config), logits.rows)
        all_tiles = ceil_div(self.vocabulary, logits.columns)
        cuts = [
            replace(cut, columns=tiles * logits.columns)
            for _, _, cut in sorted(self._roughly(row_tiles))[:2]
            for tiles in sorted(_strip_tiles(cut.columns // logits.columns, all_tiles, self.programs, height))
            if not self.whole or tiles == all_tiles
        ]
        return min(cuts, key=lambda cut: self._time([cut]))

    def _time(self, cuts: Sequence[Cut]) -> float:
        return forward_time(cuts, self.dim, self.vocabulary, self.element_size, self.config, self.programs)

    def _roughly(self, row_tiles: int) -> list[tuple[float, int, Cut]]:
        """Rough times, numbers of partial sums, and cuts with the widest strips that fit, of one block.

        The time is the second product's, because the first one fills its waves with any rows and partial sums.
        """
        tile, chip, columns = self.config.weighted, self.config.chip, self.config.logits.columns
        rows, elements = row_tiles * _row_unit(self.config), tile.rows * tile.columns
        all_tiles = ceil_div(self.vocabulary, columns)
        result = ceil_div(rows, tile.rows) * ceil_div(self.dim, tile.columns)
        overhead = FILL / chip.clock + 8 * elements / chip.memory
        found = []
        for splits in range(1, MOST_SPLITS + 1):
            left = min(self.allowed - splits * rows * self.dim * 4, 256 * MIB)
            fits = all_tiles if self.whole and left >= 0 else left // (rows * (columns * self.element_size + 8))
            widest = min(fits, all_tiles)
            if row_tiles == splits == 1:  # the smallest block is used even where it does not fit
                widest = max(1, all_tiles if self.whole else widest)
            if widest >= 1:
                product = 2 * elements * self.vocabulary / (splits * chip.operations)
                seconds = waves(result * splits, self.programs) * (product + ceil_div(all_tiles, widest) * overhead)
                found.append((seconds, splits, Cut(rows, widest * columns, splits)))
        return found


def _strip_tiles(widest: int, all_tiles: int, programs: int, *heights: int) -> set[int]:
    """Numbers of column tiles per strip worth a look: the most that fit, strips of equal width, and whole waves.

    heights: tiles of a product for each column tile of the strip.
    """
    widest = min(widest, all_tiles)
    equal = ceil_div(all_tiles, ceil_div(all_tiles, widest))
    whole = {height * widest // programs * programs // height for height in heights}
    return {widest, equal} | {tiles for tiles in whole if tiles}
