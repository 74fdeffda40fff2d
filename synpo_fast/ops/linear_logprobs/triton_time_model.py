"""Predicts the time of the Triton kernels from counts: waves of tiles, memory traffic and launches.

    product = max(waves * tile, memory) + EXPOSED * memory + LAUNCH        waves = ceil(tiles / multiprocessors)
    tile    = operations / rate + (FILL + epilogue) cycles + partial sums read and written

A persistent kernel runs one tile at a time on each multiprocessor, so a last wave with few tiles takes as long as a full one.
triton_config.py chooses the split of a problem with this model. benchmarks/head/predicted_times.py publishes its predictions.

Nothing here was measured with these kernels. The sources of the constants:
- measured on an H200 of this project's workplace: 4.3 TB/s for a copy, 769-798 TFLOP/s for cuBLAS (bf16, 8192 x 8192 x 8192);
- vendors' datasheets (dense bf16): H200 990 TFLOP/s and 4.8 TB/s, B200 2250 and 8, A100 312 and 2.0;
- counted in the machine code (benchmarks/head/compiled_code.py): the instructions of an epilogue;
- the rest are assumptions, and say so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from synpo_fast.ops.linear_logprobs.triton_config import Cut, KernelConfig, Tile


@dataclass(frozen=True)
class Chip:
    """Rates of one multiprocessor: operations and bytes of device memory per second, cycles per second."""

    multiprocessors: int
    operations: float
    memory: float
    clock: float


# Assumptions: the loop of a product reaches 0.71 of the datasheet's rate (700 TFLOP/s on an H200, where QuACK publishes 732),
# memory 0.9 of it as measured on the H200, and clocks under load are 0.2-0.3 GHz below the highest ones.
HOPPER = Chip(132, operations=0.71 * 990e12 / 132, memory=4.3e12 / 132, clock=1.6e9)
BLACKWELL = Chip(148, operations=0.71 * 2250e12 / 148, memory=0.9 * 8e12 / 148, clock=1.7e9)
AMPERE = Chip(108, operations=0.71 * 312e12 / 108, memory=0.9 * 2e12 / 108, clock=1.3e9)

# Assumption: part of the rate that tiles below 128 x 256 reach from Hopper on, because they load more per operation.
SMALL_TILE = 0.85
FILL = 1500  # assumption: cycles from the first load of a tile to the first operation, about 1 microsecond
LAUNCH = 3e-6  # assumption: seconds from the end of a kernel to the first tile of the next one
ROW = (
    2e-6 / 16
)  # assumption: seconds that a program for one row occupies a multiprocessor, which runs 16 of them at a time
EXPOSED = 0.1  # assumption: part of the overlapped memory traffic that still delays a product

# Cycles per element of a tile outside the product's loop: instructions of a warp * warps / (4 schedulers * elements), at one
# instruction per cycle and scheduler. tests/ops/linear_logprobs/test_compiled_code.py compares them with the machine code.
EXPONENTIALS, WEIGHTED, LOGIT_GRADS, WEIGHT_GRAD = 0.17, 0.08, 0.18, 0.05


class Product(NamedTuple):
    """A matrix product that is launched `launches` times."""

    kernel: str
    launches: int
    tile: Tile
    tiles: int
    depth: int  # length of the sum over which a tile multiplies
    epilogue: float  # cycles per element
    summed: int  # bytes of fp32 partial sums that a tile reads and writes outside its loop
    traffic: int  # bytes of device memory that move while the product runs


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def waves(tiles: int, programs: int) -> int:
    """Number of tiles that the busiest multiprocessor runs."""
    return ceil_div(tiles, programs)


def product_time(product: Product, chip: Chip, programs: int) -> float:
    """Seconds of one launch."""
    tile = product.tile
    elements = tile.rows * tile.columns
    rate = chip.operations if chip is AMPERE or elements >= 128 * 256 else SMALL_TILE * chip.operations
    depth = ceil_div(product.depth, tile.depth) * tile.depth
    seconds = 2 * elements * depth / rate + (FILL + product.epilogue * elements) / chip.clock
    seconds += product.summed / chip.memory
    memory = product.traffic / (chip.memory * programs)
    return max(waves(product.tiles, programs) * seconds, memory) + EXPOSED * memory + LAUNCH


def occupancy(products: list[Product], programs: int) -> float:
    """Part of the multiprocessors' tile slots that hold a tile, weighted by the length of a tile."""
    used = sum(p.launches * p.tiles * p.depth for p in products)
    return used / sum(p.launches * waves(p.tiles, programs) * programs * p.depth for p in products)


def _parts(whole: int, part: int) -> list[tuple[int, int]]:
    """Sizes of the pieces of `whole`, with their counts: full ones and the rest."""
    full, rest = divmod(whole, part)
    return [(size, count) for size, count in ((part, full), (rest, 1)) if size and count]


def forward_products(
    cuts: Sequence[Cut], dim: int, vocabulary: int, element_size: int, config: KernelConfig, programs: int
) -> Iterator[Product]:
    """All products of a forward pass that also computes the direction. cuts: one for each block of rows.

    GROUP row tiles visit the tiles of W together, so each group reads a strip of W once. Of the exponentials a group reads
    once per wave what its tiles of this wave need.
    """
    logits, weighted = config.logits, config.weighted
    for cut, blocks in Counter(cuts).items():
        rows = cut.rows
        logit_rows, row_tiles = ceil_div(rows, logits.rows), ceil_div(rows, weighted.rows)
        for index, (width, strips) in enumerate(_parts(vocabulary, cut.columns)):
            count = blocks * strips
            w, e = width * dim * element_size, rows * width * element_size
            tiles = logit_rows * ceil_div(width, logits.columns)
            read = ceil_div(logit_rows, logits.group) * w + rows * dim * element_size
            yield Product("exponentials", count, logits, tiles, dim, EXPONENTIALS, 0, read + e)
            column_tiles = ceil_div(dim, weighted.columns)
            tiles = row_tiles * column_tiles * cut.splits
            abreast = waves(column_tiles * min(row_tiles, weighted.group) * cut.splits, programs)
            read = ceil_div(row_tiles, weighted.group) * w + abreast * e
            sums = 4 * weighted.rows * weighted.columns
            part = ceil_div(width, cut.splits)
            first = blocks if index == 0 else 0  # the first strip of a block only writes its partial sums
            if first:
                yield Product("weighted", first, weighted, tiles, part, WEIGHTED, sums, read)
            if count > first:
                yield Product("weighted", count - first, weighted, tiles, part, WEIGHTED, 2 * sums, read)


def forward_time(
    cuts: Sequence[Cut], dim: int, vocabulary: int, element_size: int, config: KernelConfig, programs: int
) -> float:
    """Seconds of a forward pass that also computes the direction: products, and passes over rows that only move bytes."""
    chip = config.chip
    products = forward_products(cuts, dim, vocabulary, element_size, config, programs)
    seconds = sum(product.launches * product_time(product, chip, programs) for product in products)
    num_rows = sum(cut.rows for cut in cuts)
    strips = [ceil_div(vocabulary, cut.columns) for cut in cuts]
    settled = 8 * num_rows * ceil_div(vocabulary, config.logits.columns)
    # Rows are copied, read again and finished, and their partial sums are added.
    moved = 4 * dim * sum(cut.rows * (element_size + cut.splits) for cut in cuts)
    seconds += (sum(strips) + len(cuts) + 1) * LAUNCH + (settled + moved) / (chip.memory * programs)
    # Preparing has a program for each row, settling one for each row and strip, finishing one for each row and block.
    settling = sum(cut.rows * count for cut, count in zip(cuts, strips, strict=True))
    return seconds + (settling + (1 + len(cuts)) * num_rows) * ROW / programs


def backward_products(
    num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, columns: int
) -> Iterator[Product]:
    """All products of the head's gradient with recomputed logits."""
    logits, grads = config.logit_grads, config.weight_grad
    x = num_rows * dim * element_size
    for width, strips in _parts(vocabulary, columns):
        w, g = width * dim * element_size, num_rows * width * element_size
        row_tiles = ceil_div(num_rows, logits.rows)
        tiles = row_tiles * ceil_div(width, logits.columns)
        traffic = ceil_div(row_tiles, logits.group) * w + x + g
        yield Product("logit_grads", strips, logits, tiles, dim, LOGIT_GRADS, 0, traffic)
        row_tiles = ceil_div(width, grads.rows)
        tiles = row_tiles * ceil_div(dim, grads.columns)
        traffic = ceil_div(row_tiles, grads.group) * x + g + w
        yield Product("weight_grad", strips, grads, tiles, num_rows, WEIGHT_GRAD, 0, traffic)


def kept_time(
    cuts: Sequence[Cut], dim: int, vocabulary: int, element_size: int, config: KernelConfig, programs: int
) -> float:
    """Seconds of forward and head's gradient, 6NDV, where the exponentials of all rows are kept."""
    tile, num_rows = config.weight_grad, sum(cut.rows for cut in cuts)
    row_tiles = ceil_div(vocabulary, tile.rows)
    tiles, x = row_tiles * ceil_div(dim, tile.columns), num_rows * dim * element_size
    traffic = ceil_div(row_tiles, tile.group) * x + vocabulary * (num_rows + dim) * element_size
    gradient = Product("weight_grad", 1, tile, tiles, num_rows, WEIGHT_GRAD, 0, traffic)
    forward = forward_time(cuts, dim, vocabulary, element_size, config, programs)
    return forward + product_time(gradient, config.chip, programs)


def backward_time(
    num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig, columns: int, programs: int
) -> float:
    """Seconds of the head's gradient with recomputed logits."""
    products = backward_products(num_rows, dim, vocabulary, element_size, config, columns)
    return sum(product.launches * product_time(product, config.chip, programs) for product in products)
