"""torch.autocast around the op: its inputs are cast as those of a linear layer, and nothing inside it is."""

import contextlib
from typing import Any

import torch
from torch import Tensor


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(tensor: Tensor) -> Any:
    """A context in which autocast is off: the op chooses its own precisions, so a surrounding autocast must not apply."""
    if _autocast_is_on(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def autocast_inputs(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Casts the arguments as autocast casts those of a linear layer; returns them unchanged where autocast is off."""
    if not isinstance(hidden, Tensor) or not _autocast_is_on(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return _cast(hidden, dtype), _cast(weight, dtype), _cast(bias, dtype)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor
