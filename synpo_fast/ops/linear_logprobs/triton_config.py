"""Tile sizes of the Triton kernels by GPU generation and dtype, and the split of a problem to meet a memory bound.

tests/ops/linear_logprobs compiles the kernels ahead of time with these sizes and checks the machine code: matrix instructions of
the generation, no spills, shared memory within the chip's limit. Tuning on hardware starts from these sizes.
"""

from dataclasses import dataclass

import torch

MIB = 2**20


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
    copy_engine: bool  # load operands through tensor descriptors; before Hopper these lose the software pipeline


def kernel_config(dtype: torch.dtype, capability: int, *, simple: bool = True) -> KernelConfig:
    """Tile sizes for a dtype and a compute capability (80, 90, 100, ...; 0: Triton's interpreter).

    The interpreter gets small tiles, so that small test problems span many of them.
    simple: True if the copy engine can load the operands and the logits have no softcap. Otherwise the widest tiles would
    need too many registers. Consumer Blackwell (120) has as little shared memory as the generation before Hopper.
    """
    if capability == 0:
        logits, weighted = Tile(16, 32, 16, 2, 1, 1), Tile(16, 16, 32, 2, 1, 1)
        return KernelConfig(logits, weighted, logits, Tile(32, 16, 16, 2, 1, 1), copy_engine=True)
    if dtype == torch.float32:
        small = Tile(64, 64, 32, 8, 4, 2)
        return KernelConfig(small, small, small, small, copy_engine=90 <= capability < 120)
    if capability < 90 or capability >= 120:
        tile = Tile(128, 128, 32, 8, 8, 3)
        return KernelConfig(tile, tile, Tile(128, 64, 32, 8, 4, 3), tile, copy_engine=False)
    if not simple:
        tile = Tile(128, 128, 64, 8, 8, 3)
        return KernelConfig(tile, tile, tile, tile, copy_engine=True)
    if capability < 100:
        return KernelConfig(
            logits=Tile(128, 256, 64, 8, 8, 3),
            weighted=Tile(128, 256, 64, 8, 8, 4),
            logit_grads=Tile(128, 128, 64, 8, 8, 3),
            weight_grad=Tile(128, 256, 64, 8, 8, 4),
            copy_engine=True,
        )
    return KernelConfig(
        logits=Tile(128, 256, 64, 8, 8, 3),
        weighted=Tile(128, 128, 64, 8, 8, 4),
        logit_grads=Tile(128, 128, 64, 8, 8, 3),
        weight_grad=Tile(128, 256, 64, 8, 8, 4),
        copy_engine=True,
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
    """Split of the forward pass that keeps extra memory (all but the result) within 5 % of full fp32 logits for N >= 4096.

    The copied rows count as extra memory. With fewer rows the exponentials may take 64 MiB. A strip is allowed at least 16 MiB:
    with a small vocabulary (V < 12 D or so) the copied rows alone exceed 5 %.

    Wide strips read and write the partial sums less often. Few rows are split over the vocabulary, because their
    [rows, D] result alone has too few tiles to fill the chip.
    """
    rows = min(num_rows, 4096 if num_rows >= 8192 else 2048)
    tiles = -(-rows // config.weighted.rows) * -(-dim // config.weighted.columns)
    splits = max(1, min(8, num_programs // tiles))
    fixed = (
        num_rows * dim * element_size + splits * rows * dim * 4 + 2 * rows * -(-vocabulary // config.logits.columns) * 4
    )
    allowed = _allowed(num_rows, vocabulary, fixed)
    return Cut(rows, _strip(rows, vocabulary, element_size, allowed, config.logits.columns, splits), splits)


def cut_weight_grad(num_rows: int, dim: int, vocabulary: int, element_size: int, config: KernelConfig) -> int:
    """Number of vocabulary columns whose logit gradients, for all rows, fit the same bound."""
    allowed = _allowed(num_rows, vocabulary, num_rows * dim * element_size)
    return _strip(num_rows, vocabulary, element_size, allowed, config.logit_grads.columns, 1)


def _allowed(num_rows: int, vocabulary: int, fixed: int) -> int:
    """Number of bytes that a strip may take."""
    least = 16 * MIB if num_rows >= 4096 else 64 * MIB
    return min(max(least, num_rows * vocabulary * 4 // 20 - fixed), 256 * MIB)


def _strip(rows: int, vocabulary: int, element_size: int, allowed: int, multiple: int, splits: int) -> int:
    """Number of columns per strip: as few strips as fit, of about equal width, in whole tiles."""
    multiple *= splits
    widest = max(multiple, allowed // (rows * element_size) // multiple * multiple)
    strips = -(-vocabulary // widest)
    return -(-vocabulary // (strips * multiple)) * multiple
