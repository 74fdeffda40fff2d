"""A fake GPU: its tensors have a shape, dtype and device but no values, and raise the errors of a real GPU's tensors.

torch's FakeTensorMode raises them: for an operation that mixes a host tensor with a device tensor, and for a shape that depends
on values. It needs a torch built for CUDA. Two things are added:

- Host tensors stay real. The code under rehearsal counts, sorts and measures on the host before it sends anything, and must be
  able to read the results. Only tensors on the device, or sent to it, are fake.
- Every wait of the host for the device is recorded, with its place in our code or in transformers: a value read, a tensor
  fetched, a copy that is not from pinned memory or not asynchronous, a mask turned into positions.

Reading a value returns 1, so that the rehearsal can continue. Triton's launchers run, but not their kernels. Backward passes
cannot be rehearsed: autograd asks CUDA itself for its device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PACKAGES = ("synpo_fast", "transformers", "peft", "deepspeed", "torchvision")
aten = torch.ops.aten
# The shape of their result depends on values on the device.
SHAPED_BY_VALUES = (
    aten.nonzero.default, aten.masked_select.default, aten.repeat_interleave.Tensor, aten._unique2.default,
    aten.unique_consecutive.default, aten.unique_dim.default,
)  # fmt: skip
VALUES = {torch.bool: True}
INDEXES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class FakeGpu(TorchDispatchMode):
    """Makes device="cuda" work without a GPU. waits: where the host would have waited, "package/file:line function: what"."""

    # Pinned storages by address, kept alive: our own code keeps pinned tables as long as the process lives.
    _pinned: ClassVar[dict[int, torch.UntypedStorage]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> FakeGpu:
        self._fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        target = kwargs.get("device")
        if any(isinstance(leaf, FakeTensor) for leaf in leaves) or (target is not None and target.type == "cuda"):
            return self._on_the_device(func, args, kwargs)
        return self._on_the_host(func, args, kwargs)

    def _on_the_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._pin_memory.default:
            func, args, kwargs = aten.clone.default, args[:1], {"pin_memory": True}
        pinned = kwargs.pop("pin_memory", None)
        with no_dispatch():
            made = func(*args, **kwargs)
        if pinned:
            self._pinned[made.untyped_storage().data_ptr()] = made.untyped_storage()
        return made

    def _on_the_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            self._note("reads a value")
            return VALUES.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func is aten._to_copy.default:
            self._note_copy(args[0], kwargs.get("device"), kwargs.get("non_blocking", False))
        elif func is aten.copy_.default:
            self._note_copy(args[1], args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        elif func in SHAPED_BY_VALUES and kwargs.get("output_size") is None:
            self._note("waits for a shape")
        elif func in INDEXES:
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self._note("indexes by a mask")
                elif index is not None and not isinstance(index, FakeTensor) and index.dim():
                    self._note("indexes by a tensor of the host")
        return func(*args, **kwargs)

    def _note_copy(self, source: Tensor, target: torch.device | None, non_blocking: bool) -> None:
        here = source.device.type
        there = here if target is None else target.type
        if (here, there) == ("cuda", "cpu"):
            self._note("fetches a tensor")
        elif (here, there) == ("cpu", "cuda") and not (non_blocking and self._is_pinned(source)):
            self._note("copies from ordinary memory" if non_blocking else "waits for a copy")

    def _is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def _note(self, what: str) -> None:
        self.waits.append(f"{place_of(sys._getframe(1))}: {what}")


def place_of(frame: Any) -> str:
    """The innermost line of one of PACKAGES in the stack of `frame`, as package/.../file.py:line function."""
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        for package in PACKAGES:
            if package in parts:
                start = len(parts) - 1 - parts[::-1].index(package)
                return f"{'/'.join(parts[start:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


class FakeStream:
    """Replaces torch.cuda.Stream and torch.cuda.Event. It does nothing: without values the order of work has no effect."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> FakeStream:
        return self

    def wait_event(self, event: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass


def _swap(first: Tensor, second: Tensor, *, swap: Any = torch.utils.swap_tensors) -> None:
    """Replaces torch.utils.swap_tensors, with which modules move to a device. If the tensors are already there, swapping ones
    without values changes nothing, and torch refuses it while other references to them exist."""
    if (first.device, first.dtype, first.shape) != (second.device, second.dtype, second.shape):
        swap(first, second)


def _do_not_launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
    """Replaces Triton's JITFunction.run. Like the original, it raises for a host tensor."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.device.type != "cuda":
            raise ValueError(
                f"a tensor of the host, {tuple(value.shape)}, was given to the Triton kernel {kernel.__name__}"
            )


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """A FakeGpu of compute capability 9.0. torch.cuda.is_available() stays False: torch would call the driver."""
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, name="fake", major=9, minor=0)
    in_place = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "device_of": lambda tensor: nullcontext(),
        "Stream": FakeStream,
        "Event": FakeStream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: FakeStream(),
    }
    with ExitStack() as patches:
        for name, value in in_place.items():
            patches.enter_context(mock.patch(f"torch.cuda.{name}", value))
        patches.enter_context(mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None))
        patches.enter_context(mock.patch("torch.utils.swap_tensors", _swap))
        patches.enter_context(mock.patch.object(JITFunction, "run", _do_not_launch))
        yield patches.enter_context(FakeGpu())
