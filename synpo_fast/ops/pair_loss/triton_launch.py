"""Launches the kernel of synpo_pair_loss: one launch, no synchronisation."""

import torch
from torch import Tensor

from synpo_fast.ops.pair_loss import triton_kernels as kernels


def synpo_pair_loss_forward(
    logps: Tensor,
    chosen_offsets: Tensor,
    rejected_offsets: Tensor,
    mask: Tensor | None,
    alpha: float,
    beta: float,
    logsigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns losses [P], statistics [5, P], coefficients [N] and the number of skipped pairs [1]."""
    num_pairs = chosen_offsets.shape[0] - 1
    losses = torch.empty(num_pairs, dtype=torch.float32, device=logps.device)
    statistics = torch.empty(5, num_pairs, dtype=torch.float32, device=logps.device)
    coefficients = torch.zeros_like(logps)
    num_empty = torch.zeros(1, dtype=torch.int32, device=logps.device)
    with torch.cuda.device_of(logps):
        kernels._synpo_pair_loss_forward_kernel[(num_pairs,)](
            logps, None if mask is None else mask.view(torch.uint8), chosen_offsets, rejected_offsets,
            losses, statistics, coefficients, num_empty, num_pairs, alpha, beta,
            LOGSIGMOID=logsigmoid, HAS_MASK=mask is not None, BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return losses, statistics, coefficients, num_empty
