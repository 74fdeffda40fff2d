"""Counts on a CPU where the host would wait for a GPU during a step.

Reading one value from a GPU (`.item()`, `bool()`, `.tolist()`, `.cpu()`, `nonzero()`, an index by a mask) waits for all work
queued before it. So does `torch.tensor(value, device=...)`, which copies from pageable memory. Each such call is recorded with
its place. Tensors that stay on the host on a GPU machine too, such as token ids, grids and positions, are made and read inside
a few functions, whose calls are not recorded. tests/rehearsal checks, with GPU tensors, that these functions hold no tensor of
the device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGES = ("synpo_fast", "transformers", "deepspeed", "peft")
# Functions that work on the host, and the head's host backends, which Triton replaces on a GPU (but not in full fp32).
ON_THE_HOST = {"row_inputs", "tower_inputs", "host_grids", "_digest", "valid_rows"}
# Functions that read the grid, which our call leaves on the host.
READS_THE_GRID = {"get_video_features", "get_image_features"}
METHODS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")


READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten._unique2.default,
)
INDEXES = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class HostReads(TorchDispatchMode):
    """Records where the host would wait. places: "package file function", in order."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._noted = False  # True inside a method that has been recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._noted and (func in READS or (func in INDEXES and any(map(_is_mask, args[1])))):
            self._note()
        return func(*args, **(kwargs or {}))

    def noting(self, call: Any, when: Callable[..., bool] = lambda *_, **__: True) -> Any:
        """Wraps `call` so that it is recorded each time that `when` is true for its arguments."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._noted or not when(*args, **kwargs):
                return call(*args, **kwargs)
            self._note()
            self._noted = True
            try:
                return call(*args, **kwargs)
            finally:
                self._noted = False

        return noted

    def _note(self) -> None:
        frame: Any = sys._getframe(2)
        inside, place = set(), None
        while frame is not None:
            file, function = Path(frame.f_code.co_filename), frame.f_code.co_name
            package = next((name for name in PACKAGES if name in file.parts), None)
            if place is None and package is not None:
                place = f"{package} {file.name} {function}"
                if function in READS_THE_GRID:
                    return
            inside.add(function)
            frame = frame.f_back
        if not inside & ON_THE_HOST:
            self.places.append(place or "elsewhere")


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostReads]:
    """Records all reads inside the `with` block. Reads that losses do only on a CPU are switched off, as on a GPU."""
    reads = HostReads()
    with monkeypatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if not name.startswith("synpo_fast.losses.") or not hasattr(module, "host_can_read"):
                continue
            patch.setattr(module, "host_can_read", lambda tensor: False)
        for name in METHODS:
            patch.setattr(Tensor, name, reads.noting(getattr(Tensor, name)))
        patch.setattr(torch, "tensor", reads.noting(torch.tensor, lambda *_, device=None, **__: device is not None))
        with reads:
            yield reads
