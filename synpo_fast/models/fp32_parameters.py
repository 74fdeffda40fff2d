"""Parameters that stay in fp32 while the model trains in bf16 or fp16.

Some models declare such parameters (`_keep_in_fp32_modules`), and from_pretrained loads them in fp32. DeepSpeed's engine casts
every parameter to the training dtype but does not cast buffers. So the frozen ones become buffers, with the same name, place in
the model and in its state_dict, and values. transformers reads a model's `dtype` from its first parameter and casts pixels to it:
parts of the model whose first parameter became a buffer continue to report that buffer's dtype.
"""

from __future__ import annotations

import torch
from torch import nn

from synpo_fast.errors import UserError


def keep_from_casting(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Turns the frozen parameters whose dtype is not `dtype` into buffers, and returns their names.

    Raises UserError if such a parameter trains: a 16-bit engine's optimiser holds all trained parameters in one dtype.
    """
    others = [(n, p) for n, p in module.named_parameters() if p.is_floating_point() and p.dtype != dtype]
    trained = [f"{name} ({_short(parameter.dtype)})" for name, parameter in others if parameter.requires_grad]
    if trained:
        raise UserError(
            f"{len(trained)} trained parameters must not be in {_short(dtype)}, the first is {trained[0]}, but DeepSpeed holds "
            "all trained parameters in one type: train an adapter (use_peft=true), or train in fp32 (bf16=false)"
        )
    kept = {id(parameter) for _, parameter in others}
    begin_with = _parts_that_begin_with(kept, module)
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in kept:
                delattr(owner, name)
                owner.register_buffer(name, parameter.detach())
    for part, weight in begin_with:
        _report_as(part, weight.dtype, weight.device)
    return [name for name, _ in others]


def _parts_that_begin_with(kept: set[int], module: nn.Module) -> list[tuple[nn.Module, torch.Tensor]]:
    """The transformers models inside `module` (such as the vision tower) whose first parameter is kept, with that parameter."""
    from transformers import PreTrainedModel

    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    firsts = [(part, next((p for p in part.parameters() if p.is_floating_point()), None)) for part in parts]
    return [(part, first) for part, first in firsts if first is not None and id(first) in kept]


def _report_as(part: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Makes a model report this dtype and device. They are properties of its class, so it gets a class of its own with the
    same name."""
    kind = type(part)
    members = {
        "dtype": property(lambda self: dtype),
        "device": property(lambda self: device),
        "__module__": kind.__module__,
    }
    part.__class__ = type(kind.__name__, (kind,), members)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
