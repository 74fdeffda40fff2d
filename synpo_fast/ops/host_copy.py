"""Sends several small host tensors to a device in one asynchronous copy.

`tensor.to("cuda")` from pageable memory blocks the host until the GPU has finished all work queued before it. Here all tensors
are packed into one pinned buffer, one copy transfers it while the host continues, and each result is a view of the copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: a view's start must be a multiple of its element's size

Name = TypeVar("Name")


def to_device(tensors: Mapping[Name, Tensor], device: torch.device) -> dict[Name, Tensor]:
    """Returns the tensors on `device` under the same names, dtypes and shapes. For a CPU they are returned unchanged.

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
    """All tensors concatenated as bytes, uint8 [bytes]; each starts at a multiple of ALIGNMENT."""
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
