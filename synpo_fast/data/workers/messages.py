"""Sends Python objects between processes, with their tensors in anonymous shared memory.

A message is one anonymous file (memfd): the pickle, then every tensor at a multiple of 64 bytes. A Unix socket carries only its
file descriptor and a header of 16 bytes, so the sender never waits for the receiver, however big the message is. Nothing is
left under /dev/shm: the kernel frees the memory with the last process or tensor that holds it, even after kill -9.

The receiver's tensors are views of the shared memory, without a copy. All tensors of one message share one storage.
"""

import array
import io
import os
import pickle
import socket
import struct
from typing import Any

import torch
from torch import Tensor

HEADER = struct.Struct("<QQ")  # bytes of the pickle, bytes in all
ALIGNMENT = 64


def send_message(connection: socket.socket, message: Any) -> None:
    """Sends a message. Raises ValueError for a tensor outside the CPU's memory, BrokenPipeError if the other side is closed."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(message)
    begin = _aligned(pickled.tell())
    total = begin + pickler.size
    with open(os.memfd_create("synpo_fast"), "wb") as file:
        file.write(pickled.getbuffer())
        file.truncate(total)  # also flushes; without it torch would enlarge the file and write a byte of its own
        shared = _mapped(file.fileno(), total)
        for offset, tensor in pickler.tensors:
            data = tensor.contiguous().view(-1).view(torch.uint8)
            shared[begin + offset : begin + offset + data.numel()].copy_(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()]))]
        connection.sendmsg([HEADER.pack(pickled.tell(), total)], rights)


def receive_message(connection: socket.socket) -> Any:
    """Waits for a message and returns it. Raises EOFError when the other side is closed."""
    header, descriptors, _, _ = socket.recv_fds(connection, HEADER.size, 1)
    if not header:
        raise EOFError("the other side closed the connection")
    if len(descriptors) != 1:
        raise OSError("a message arrived without its file descriptor: this process has too many open files")
    assert len(header) == HEADER.size, header
    size, total = HEADER.unpack(header)
    try:
        pickled, shared = os.pread(descriptors[0], size, 0), _mapped(descriptors[0], total)
    finally:
        os.close(descriptors[0])
    return _Unpickler(pickled, shared[_aligned(size) :]).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the pickle, and records the offset of each."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[tuple[int, Tensor]] = []
        self.size = 0

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        if obj.device.type != "cpu" or obj.layout != torch.strided:
            raise ValueError(f"only dense tensors in the CPU's memory can be sent, got {obj.layout} on {obj.device}")
        offset = self.size
        self.tensors.append((offset, obj.detach()))
        self.size += _aligned(obj.numel() * obj.element_size())
        return offset, obj.dtype, tuple(obj.shape)


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, tensors: Tensor) -> None:
        super().__init__(io.BytesIO(pickled))
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> Tensor:
        offset, dtype, shape = pid
        count = torch.Size(shape).numel()
        data = self.tensors[offset : offset + count * dtype.itemsize]
        return data.view(dtype).view(shape)


def _mapped(descriptor: int, size: int) -> Tensor:
    # From a path, because mmap.mmap would keep a descriptor open for as long as a tensor exists.
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
