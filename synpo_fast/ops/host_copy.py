"""Small tensors made on the host, sent to a device in one copy that nobody waits for.

`tensor.to("cuda")` from ordinary memory stops the host until the GPU has done everything asked of it before. One buffer in pinned
memory holds them all here, one copy takes it over while the host goes on, and each tensor is a view of the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: a view's start must be a multiple of its element's size

Name = TypeVar("Name")


def to_device(tensors: Mapping[Name, Tensor], device: torch.device) -> dict[Name, Tensor]:
    """The tensors under their names on `device`, dtypes and shapes kept. On a CPU they are returned as they are.

    Raises ValueError for a tensor that is not on the host.
    """
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} is on {tensor.device}; only tensors on the host are sent")
    if device.type == "cpu":
        return dict(tensors)
    buffer = packed(tensors, pinned=device.type == "cuda")
    return unpacked(buffer.to(device, non_blocking=True), tensors)


def packed(tensors: Mapping[Name, Tensor], *, pinned: bool = False) -> Tensor:
    """uint8 [bytes]: all tensors one behind another, each at a multiple of ALIGNMENT."""
    buffer = torch.empty(sum(_room(tensor) for tensor in tensors.values()), dtype=torch.uint8, pin_memory=pinned)
    for tensor, view in zip(tensors.values(), unpacked(buffer, tensors).values(), strict=True):
        view.copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, like: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """Views of a packed buffer, with the names, dtypes and shapes of `like`."""
    views, at = {}, 0
    for name, tensor in like.items():
        views[name] = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        at += _room(tensor)
    return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
