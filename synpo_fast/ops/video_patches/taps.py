"""Weights ("taps") of the antialiased bicubic resize along one axis, identical to those of torch and Pillow.

Output i of n_out has its centre c = s (i + 1/2) among the n_in inputs, s = n_in / n_out. It is the sum of the inputs j in
[c - r + 1/2, c + r + 1/2), r = 2 max(s, 1), with weights k((j + 1/2 - c) / max(s, 1)) scaled to sum 1, where

    k(x) = 1.5 |x|^3 - 2.5 |x|^2 + 1               for |x| < 1          (bicubic, a = -1/2)
         = -0.5 |x|^3 + 2.5 |x|^2 - 4 |x| + 2      for |x| < 2

For uint8, torch's CPU code works in integers. The weights are multiplied by 2^p and rounded to int16, with p as large as fits,
and after each axis the result is (sum + 2^(p - 1)) >> p, clamped to [0, 255]. Integer sums do not depend on the order of
addition, so a GPU with the same weights gives the same pixels, to the bit.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TAP_STEP = 4  # number of taps the kernel reads at a time; column tables are padded with weights of 0
MAX_PRECISION = 22


@dataclass(frozen=True)
class Taps:
    """A table of integer weights. num_taps: weights per output (column_taps) or inputs per block of outputs (row_taps)."""

    table: Tensor
    num_taps: int
    precision: int


@functools.lru_cache(maxsize=64)
def column_taps(n_in: int, n_out: int, pinned: bool) -> Taps:
    """Taps with table int32 [1 + num_taps, n_out]: the first input of each output, then its weights.

    pinned: put the table in pinned memory, so that copying it to a GPU does not block.
    """
    starts, _, weights = float_taps(n_in, n_out)
    integers, precision = integer_taps(weights)
    padding = integers.new_zeros(-len(integers) % TAP_STEP, n_out)
    table = torch.cat([starts[None].int(), integers, padding])
    return Taps(table.pin_memory() if pinned else table, len(table) - 1, precision)


@functools.lru_cache(maxsize=64)
def row_taps(n_in: int, n_out: int, block: int, pinned: bool) -> Taps:
    """Taps with table int32 [n_blocks, 2 + num_taps * block]. Each row describes a block of outputs: the first of its inputs,
    the end of its inputs, then for each input its weight in each output of the block (0 if that output does not use it)."""
    starts, ends, weights = float_taps(n_in, n_out)
    integers, precision = integer_taps(weights)
    firsts, lasts = starts[::block], ends[torch.arange(block - 1, n_out + block - 1, block).clamp(max=n_out - 1)]
    num_inputs = int((lasts - firsts).max())
    dense = integers.new_zeros(len(firsts), num_inputs, block)
    output = torch.arange(n_out)
    for tap, weights_of_tap in enumerate(integers):
        held = tap < ends - starts
        which = output[held]
        dense[which // block, starts[held] + tap - firsts[which // block], which % block] = weights_of_tap[held]
    table = torch.cat([firsts[:, None].int(), lasts[:, None].int(), dense.flatten(1)], dim=1)
    return Taps(table.pin_memory() if pinned else table, num_inputs, precision)


def integer_taps(weights: Tensor) -> tuple[Tensor, int]:
    """Returns weights * 2^precision, rounded half away from 0, as int32, and the largest precision at which they fit int16."""
    precision = 0
    while precision < MAX_PRECISION and int(0.5 + weights.max().item() * 2 ** (precision + 1)) < 2**15:
        precision += 1
    scaled = weights * 2**precision
    return torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(torch.int32), precision


def float_taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns starts [n_out], ends [n_out] and fp64 weights [num_taps, n_out], 0 after the end of an output's inputs."""
    if n_in == n_out:  # k is 1 at 0 and 0 at every other integer
        return torch.arange(n_out), torch.arange(1, n_out + 1), torch.ones(1, n_out, dtype=torch.float64)
    scale = n_in / n_out
    widened = max(scale, 1.0)
    centres = scale * (torch.arange(n_out, dtype=torch.float64) + 0.5)
    starts = (centres - 2 * widened + 0.5).long().clamp(min=0)
    ends = (centres + 2 * widened + 0.5).long().clamp(max=n_in)
    ends = torch.minimum(ends, starts + 2 * math.ceil(2 * widened) + 1)
    tap = torch.arange(int((ends - starts).max()))[:, None]
    weights = _bicubic((tap + starts - centres + 0.5) * (1 / widened)).masked_fill(tap >= ends - starts, 0.0)
    total = functools.reduce(torch.add, weights)  # one tap at a time, in the order in which torch adds them
    return starts, ends, weights / total


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
