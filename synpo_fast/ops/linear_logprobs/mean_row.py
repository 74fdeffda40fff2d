"""The mean row of the head's weight, in fp32, without a copy of the weight in fp32."""

import torch
from torch import Tensor

PART = 4096  # rows; a sum in another dtype copies its input


def mean_row(weight: Tensor) -> Tensor:
    """Mean over the rows of weight [V, D] in fp32 (fp64 for fp64), [D]."""
    total = weight.new_zeros(weight.shape[1], dtype=torch.promote_types(weight.dtype, torch.float32))
    for part in weight.split(PART):
        total += part.sum(0, dtype=total.dtype)
    return total / weight.shape[0]


class MeanRow(torch.autograd.Function):
    """Autograd of mean_row. The gradient of the weight is one row for all, which takes the memory of one."""

    @staticmethod
    def forward(ctx, weight):
        ctx.like = weight.shape, weight.dtype
        return mean_row(weight)

    @staticmethod
    def backward(ctx, grad):
        shape, dtype = ctx.like
        return (grad / shape[0]).to(dtype).expand(shape)
