"""Reduce ragged token values to one value per response.

Responses lie end to end in a flat tensor x [N]; response i owns x[offsets[i] : offsets[i + 1]], with offsets [P+1] in
int32 or int64 (`cu_seqlens` of the varlen kernels). Tokens at or past offsets[-1] belong to no response and count
nowhere, so a flat tensor of fixed size can be filled on a GPU without the host knowing how much of it is used.

    sum        S(y) = sum_t x_t
    mean       S(y) / T
    geometric  G(y) = exp(mean_t lp_t)
    arithmetic A(y) = mean_t exp(lp_t)

Everything is fp32, or fp64 where the input is; 16-bit inputs are converted first. Sums are accumulated in fp64: a plain
fp32 running sum over thousands of tokens is worse than eager's pairwise one, and the tensors are small. An empty
response has sum 0 and mean 0. No shape depends on data and nothing is read by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def segment_lengths(offsets: Tensor) -> Tensor:
    """Tokens in each response, int64 [P]."""
    return offsets.to(torch.int64).diff()


def segment_ids(offsets: Tensor, num_tokens: int) -> Tensor:
    """The response each token belongs to, int64 [N]; P for a token that belongs to none."""
    ends_P = offsets[1:].to(torch.int64)
    positions_N = torch.arange(num_tokens, device=offsets.device)
    return torch.searchsorted(ends_P, positions_N, right=True)


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """Sum of x [N] over each response, [P]."""
    num_segments = offsets.shape[0] - 1
    sums = torch.zeros(num_segments + 1, dtype=torch.float64, device=x.device)
    sums = sums.index_add(0, segment_ids(offsets, x.shape[0]), x.double())
    return sums[:num_segments].to(upcast(x).dtype)


def segment_mean(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of x [N] over each response, [P]."""
    return segment_sum(x, offsets) / segment_lengths(offsets).clamp(min=1)


def geometric_mean(logps: Tensor, offsets: Tensor) -> Tensor:
    """G(y) = exp(mean_t lp_t), [P]. An empty response has G = 1: mask it."""
    return segment_mean(logps, offsets).exp()


def arithmetic_mean(logps: Tensor, offsets: Tensor) -> Tensor:
    """A(y) = mean_t exp(lp_t), [P]."""
    return segment_mean(upcast(logps).exp(), offsets)


def per_token(values: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """Give each token the value of its response: values [P] -> [N]; 0 for a token that belongs to none."""
    return torch.cat([values, values.new_zeros(1)])[segment_ids(offsets, num_tokens)]
