"""SynPO's loss and coefficients in plain torch, written pair by pair from the formulas. The kernels are tested against it."""

import torch
from torch import Tensor


def synpo_pair_loss_reference(
    logps: Tensor,
    chosen_offsets: Tensor,
    rejected_offsets: Tensor,
    mask: Tensor | None,
    alpha: float,
    beta: float,
    logsigmoid: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns losses [P], statistics [5, P] (means, geometric means, arithmetic mean of chosen), coefficients [N], empty [1]."""
    num_pairs = chosen_offsets.shape[0] - 1
    losses, statistics = logps.new_zeros(num_pairs), logps.new_zeros(5, num_pairs)
    coefficients = torch.zeros_like(logps)
    num_empty = torch.zeros(1, dtype=torch.int32, device=logps.device)
    for pair in range(num_pairs):
        tokens = []
        for offsets in (chosen_offsets, rejected_offsets):
            token = torch.arange(int(offsets[pair]), int(offsets[pair + 1]), device=logps.device)
            tokens.append(token if mask is None else token[mask[token]])
        chosen, rejected = tokens
        if chosen.numel() == 0 or rejected.numel() == 0:
            num_empty += 1
            continue
        means = logps[chosen].mean(), logps[rejected].mean()
        G_chosen, G_rejected = means[0].exp(), means[1].exp()
        A_chosen = logps[chosen].exp().mean()
        x = alpha * (G_chosen - G_rejected)
        if logsigmoid:
            link, w = torch.nn.functional.logsigmoid(x), torch.sigmoid(-x)
        else:
            link, w = torch.sigmoid(x), torch.sigmoid(x) * torch.sigmoid(-x)
        losses[pair] = -link - beta * A_chosen
        statistics[:, pair] = torch.stack([*means, G_chosen, G_rejected, A_chosen])
        coefficients[chosen] = -(alpha * w * G_chosen + beta * logps[chosen].exp()) / chosen.numel()
        coefficients[rejected] = alpha * w * G_rejected / rejected.numel()
    return losses, statistics, coefficients, num_empty
