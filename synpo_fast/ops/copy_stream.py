"""Prefetches large host tensors to a GPU: copies start before they are needed and overlap with computation.

A copy from pageable memory blocks the host, and a copy on the compute stream delays the computation. Here a tensor is first
copied to pinned memory and from there to the device on a separate stream. `take` makes the compute stream wait for an event
recorded after the copy, so the host never waits. The copy's memory belongs to the copy stream. record_stream tells the allocator
that the compute stream uses it too; without that, the memory could be reused while it is still being read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The part of torch.cuda that CopyStream uses. Tests without a GPU replace it to record the calls."""

    def new_stream(self, device: torch.device) -> Any: ...
    def current_stream(self, device: torch.device) -> Any: ...
    def on(self, stream: Any) -> AbstractContextManager[Any]: ...
    def pinned(self, tensor: Tensor) -> Tensor: ...
    def record_stream(self, tensor: Tensor, stream: Any) -> None: ...


class CudaStreams:
    def new_stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.Stream(device)

    def current_stream(self, device: torch.device) -> torch.cuda.Stream:
        return torch.cuda.current_stream(device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory()

    def record_stream(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        tensor.record_stream(stream)


class CopyStream:
    """Copies tensors to one device on its own stream: begin(tensors) starts copies early, take(tensor) returns a copy."""

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device, self.streams = device, streams or CudaStreams()
        self._stream = self.streams.new_stream(device)
        self._begun: dict[
            int, tuple[Tensor, Tensor, Any]
        ] = {}  # by id: the tensor itself, its copy, the event recorded after the copy

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """Starts copying the tensors that will be taken next. Drops earlier copies that are not among them."""
        wanted = {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu"}
        self._begun = {key: begun for key, begun in self._begun.items() if key in wanted}
        for key, tensor in wanted.items():
            if key not in self._begun:
                self._begun[key] = self._copy(tensor)

    def take(self, tensor: Tensor) -> Tensor:
        """Returns the tensor on the device, for work launched on the current stream from now on. Copies it now if `begin`
        did not. A tensor that is already on a device is returned unchanged."""
        if tensor.device.type != "cpu":
            return tensor
        _, copy, event = self._begun.pop(id(tensor)) if id(tensor) in self._begun else self._copy(tensor)
        current = self.streams.current_stream(self.device)
        current.wait_event(event)
        self.streams.record_stream(copy, current)
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyStream:
        """Returns a new CopyStream without pending copies, so that a copied policy has its own stream."""
        return CopyStream(self.device, self.streams)

    def _copy(self, tensor: Tensor) -> tuple[Tensor, Tensor, Any]:
        pinned = self.streams.pinned(tensor)
        with self.streams.on(self._stream):
            copy = pinned.to(self.device, non_blocking=True)
            return tensor, copy, self._stream.record_event()
