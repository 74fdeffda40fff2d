"""Reduces ragged token values to one value per response.

Responses lie end to end in a flat tensor x [N]; response i owns x[offsets[i] : offsets[i + 1]], with offsets [P+1] in
int32 or int64 (`cu_seqlens` of the varlen kernels). Tokens at or after offsets[-1] belong to no response and are ignored,
so a GPU can fill part of a fixed-size flat tensor and the host need not know how large that part is.

    sum        S(y) = sum_t x_t
    mean       S(y) / T
    geometric  G(y) = exp(mean_t lp_t)
    arithmetic A(y) = mean_t exp(lp_t)

Results are fp32, or fp64 for fp64 inputs; 16-bit inputs are converted first. Sums are accumulated in fp64, because a plain
fp32 running sum over thousands of tokens is less accurate than eager's pairwise sum, and the tensors are small. An empty
response has sum 0 and mean 0. No shape depends on data, and the host reads no values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """Returns x in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def segment_lengths(offsets: Tensor) -> Tensor:
    """Number of tokens in each response, int64 [P]."""
    return offsets.to(torch.int64).diff()


def segment_ids(offsets: Tensor, num_tokens: int) -> Tensor:
    """Index of the response that each token belongs to, int64 [N]; P for a token that belongs to no response."""
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
    """Geometric mean probability G(y) = exp(mean_t lp_t), [P]. An empty response has G = 1; the caller must mask it."""
    return segment_mean(logps, offsets).exp()


def arithmetic_mean(logps: Tensor, offsets: Tensor) -> Tensor:
    """Arithmetic mean probability A(y) = mean_t exp(lp_t), [P]."""
    return segment_mean(upcast(logps).exp(), offsets)


def per_token(values: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """Gives each token the value of its response, [P] -> [N]; 0 for a token that belongs to no response."""
    return torch.cat([values, values.new_zeros(1)])[segment_ids(offsets, num_tokens)]
