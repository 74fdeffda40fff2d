"""Parameters that stay in fp32 while the model trains in bf16 or fp16.

Some models declare such parameters (`_keep_in_fp32_modules`), and from_pretrained loads them so. DeepSpeed's engine casts every
parameter to the type that trains and leaves buffers alone. So frozen ones become buffers: same name, same place in the model
and in its state_dict, same values.
"""

from __future__ import annotations

import torch
from torch import nn

from synpo_fast.errors import UserError


def keep_from_casting(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Makes buffers of the frozen parameters whose type is not `dtype`, and returns their names.

    Raises ValueError for one that trains: the optimiser of a 16-bit engine holds all it trains in that type.
    """
    others = [(n, p) for n, p in module.named_parameters() if p.is_floating_point() and p.dtype != dtype]
    trained = [f"{name} ({_short(parameter.dtype)})" for name, parameter in others if parameter.requires_grad]
    if trained:
        raise UserError(
            f"{len(trained)} trained parameters are not to be in {_short(dtype)}, {trained[0]} the first, but DeepSpeed holds "
            "all that it trains in one type: train an adapter (use_peft=true), or in fp32 (bf16=false)"
        )
    kept = {id(parameter) for _, parameter in others}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in kept:
                delattr(owner, name)
                owner.register_buffer(name, parameter.detach())
    return [name for name, _ in others]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
