"""Copies of large host tensors to a GPU that are begun before they are needed, beside what the GPU computes.

A copy from ordinary memory stops the host, and one on the computing stream stops the computing. Here a tensor goes to pinned
memory, from there to the device on a stream of its own, and whoever takes it lets the computing stream wait for an event behind
the copy: the host waits for nothing. The copy's memory belongs to the copying stream, so the allocator is told that the computing
stream uses it too (record_stream), or it would be given away while it is still read.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The part of torch.cuda that is used, so that tests without a GPU can look on."""

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
    """begin(tensors) starts copying the ones that come next; take(tensor) gives the copy of one, begun before or not."""

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device, self.streams = device, streams or CudaStreams()
        self._stream = self.streams.new_stream(device)
        self._begun: dict[
            int, tuple[Tensor, Tensor, Any]
        ] = {}  # by id; the tensor itself, its copy, the event behind it

    def begin(self, tensors: Iterable[Tensor]) -> None:
        """For tensors that are taken next. Copies begun earlier that are not among them are let go: nobody came for them."""
        wanted = {id(tensor): tensor for tensor in tensors if tensor.device.type == "cpu"}
        self._begun = {key: begun for key, begun in self._begun.items() if key in wanted}
        for key, tensor in wanted.items():
            if key not in self._begun:
                self._begun[key] = self._copy(tensor)

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, for work that is launched on the current stream from now on. A tensor that is on a device
        already is returned as it is."""
        if tensor.device.type != "cpu":
            return tensor
        _, copy, event = self._begun.pop(id(tensor)) if id(tensor) in self._begun else self._copy(tensor)
        current = self.streams.current_stream(self.device)
        current.wait_event(event)
        self.streams.record_stream(copy, current)
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyStream:
        """A copied policy has a stream of its own."""
        return CopyStream(self.device, self.streams)

    def _copy(self, tensor: Tensor) -> tuple[Tensor, Tensor, Any]:
        pinned = self.streams.pinned(tensor)
        with self.streams.on(self._stream):
            copy = pinned.to(self.device, non_blocking=True)
            return tensor, copy, self._stream.record_event()
