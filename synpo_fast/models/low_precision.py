"""Casts a model to bf16 or fp16 as transformers' from_pretrained(dtype=...) would load it.

`model.to(dtype)` casts too much. Rotary frequencies are buffers that must stay in fp32: rounded to bf16, an angle is off by
radians at position 2,000. Some models also declare parameters that must stay in fp32 (`_keep_in_fp32_modules`). Both follow from
the model's class. So a model built from a config, or merged from fp32 parts, can get the dtypes that loading would give it.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch


def cast_as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """Casts a transformers model in place, each tensor to the dtype that from_pretrained(dtype=dtype) gives it, and returns it.

    The model must still have full precision: casting a rounded tensor to fp32 does not restore it.
    """
    wanted = dtypes_as_loaded(model, dtype)
    for name, tensor in _named_tensors(model):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted[name])
    for config in (model.config, *(getattr(model.config, name) for name in model.config.sub_configs)):
        if config is not None:
            config.dtype = dtype
    return model


def dtypes_as_loaded(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the dtype of every parameter and buffer, by name, after from_pretrained(dtype=dtype) of this class and config."""
    from transformers.initialization import meta_device_safe_creation_ops

    # Shapes and dtypes only. from_pretrained uses the same context, in which a model's code can read values of torch.linspace.
    with torch.device("meta"), meta_device_safe_creation_ops():
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    types = {name: tensor.dtype for name, tensor in _named_tensors(empty)}
    declared = [re.compile(pattern.replace("*", ".*")) for pattern in empty._get_dtype_plan(dtype)]
    for name in empty.state_dict():  # tensors outside the checkpoint keep the dtype that the model's code gives them
        if types[name].is_floating_point and any(pattern.search(name) for pattern in declared):
            types[name] = torch.float32
    return types


def _named_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers with their names. Tied ones appear under each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
