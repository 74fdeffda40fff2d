"""A model in bf16 or fp16, as transformers' from_pretrained(dtype=...) loads it.

`model.to(dtype)` casts too much. Rotary frequencies are buffers that have to stay in fp32: rounded to bf16, an angle is off by
radians at position 2,000. Some models declare parameters that have to stay in fp32, too (`_keep_in_fp32_modules`). Both follow
from the model's class, so that a model built from a config, or merged from parts in fp32, gets the types it would be loaded with.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch


def cast_as_loaded(model: Any, dtype: torch.dtype) -> Any:
    """Casts a transformers model in place, each tensor to the type from_pretrained(dtype=dtype) gives it, and returns it.

    The model has to hold its weights in a type that loses nothing: what is to be fp32 is only widened, not restored.
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
    """The type of every parameter and buffer, by name, after from_pretrained(dtype=dtype) of this model's class and config."""
    from transformers.initialization import meta_device_safe_creation_ops

    # Shapes and types alone: from_pretrained begins like that, too, and lets a model's code read numbers from torch.linspace.
    with torch.device("meta"), meta_device_safe_creation_ops():
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    types = {name: tensor.dtype for name, tensor in _named_tensors(empty)}
    declared = [re.compile(pattern.replace("*", ".*")) for pattern in empty._get_dtype_plan(dtype)]
    for name in empty.state_dict():  # what is no part of a checkpoint has the type that the model's code gives it
        if types[name].is_floating_point and any(pattern.search(name) for pattern in declared):
            types[name] = torch.float32
    return types


def _named_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers; tied ones under each of their names."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
