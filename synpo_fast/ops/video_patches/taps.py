"""The weights of the resize, one axis at a time, as torch and Pillow take them.

Output i of n_out looks at n_in with centre c = s (i + 1/2), s = n_in / n_out, and adds the inputs j in
[c - r + 1/2, c + r + 1/2) with r = 2 max(s, 1) and weights k((j + 1/2 - c) / max(s, 1)) that are scaled to sum 1, where

    k(x) = 1.5 |x|^3 - 2.5 |x|^2 + 1               for |x| < 1          (bicubic, a = -1/2)
         = -0.5 |x|^3 + 2.5 |x|^2 - 4 |x| + 2      for |x| < 2

On uint8 torch's CPU code multiplies integers: weights times 2^p, rounded to int16, p as large as they allow, and after each
axis (sum + 2^(p - 1)) >> p, cut to [0, 255]. Integers are added in any order with the same result, so a GPU that uses the
same weights gives the same pixels, to the bit.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TAP_STEP = 4  # the kernel reads so many taps at a time; tables are filled up with weights of 0
MAX_PRECISION = 22


@dataclass(frozen=True)
class Taps:
    """num_taps counts the weights of one output (columns) or the inputs of one block of outputs (rows)."""

    table: Tensor
    num_taps: int
    precision: int


@functools.lru_cache(maxsize=64)
def column_taps(n_in: int, n_out: int, pinned: bool) -> Taps:
    """table int32 [1 + num_taps, n_out]: the first input of each output, then its weights.

    pinned: in memory a GPU can copy from without a wait.
    """
    starts, _, weights = float_taps(n_in, n_out)
    integers, precision = integer_taps(weights)
    padding = integers.new_zeros(-len(integers) % TAP_STEP, n_out)
    table = torch.cat([starts[None].int(), integers, padding])
    return Taps(table.pin_memory() if pinned else table, len(table) - 1, precision)


@functools.lru_cache(maxsize=64)
def row_taps(n_in: int, n_out: int, block: int, pinned: bool) -> Taps:
    """table int32 [n_blocks, 2 + num_taps * block]: the first input and the end of the inputs of each block of outputs, then
    for each of these inputs its weight in each output, 0 where it has none."""
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
    """Weights times 2^precision, rounded half away from 0, int32, and the largest precision that leaves them int16."""
    precision = 0
    while precision < MAX_PRECISION and int(0.5 + weights.max().item() * 2 ** (precision + 1)) < 2**15:
        precision += 1
    scaled = weights * 2**precision
    return torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).to(torch.int32), precision


def float_taps(n_in: int, n_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """starts [n_out], ends [n_out] and fp64 weights [num_taps, n_out], 0 past the end of an output's inputs."""
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
    total = functools.reduce(torch.add, weights)  # tap by tap, as torch adds them
    return starts, ends, weights / total


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
