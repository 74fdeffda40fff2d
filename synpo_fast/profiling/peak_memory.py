"""Peak extra memory of one call: the most memory it holds at once beyond that allocated before, its results included.

GPU: `torch.cuda.max_memory_allocated` during the call, less `memory_allocated` before it.

CPU: the larger of two measurements, each of which sees memory that the other misses.
- allocator: the running sum of the `[memory]` events that torch.profiler records from ATen's CPU allocator. It counts
  every tensor to the byte, inside C++ operators too, but not memory that a library or `std::vector` takes with malloc.
- resident: the kernel's high-water mark of resident memory (VmHWM, reset through /proc/self/clear_refs), less VmRSS
  before the call. It counts all touched pages, but not reserved pages that are never touched, nor the reuse of pages that an
  earlier call left behind (malloc_trim returns most of them first).
Sampling RSS from a thread would miss short peaks, and a TorchDispatchMode would miss buffers inside C++ operators.

The call is made once per measurement, separately from any timing, because the profiler slows it. Make the call once before, so
that compiling, autotuning and handle creation are not counted.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_extra_memory(call: Callable[[], Any], device: torch.device) -> dict[str, int]:
    """Returns {"peak": bytes}; on a CPU also "allocator" and "resident", the two measurements of which it is the larger."""
    gc.collect()
    if device.type == "cuda":
        return {"peak": _cuda_peak(call, device)}
    measured = {"allocator": _allocator_peak(call)}
    resident = _resident_peak(call)
    if resident is not None:
        measured["resident"] = resident
    return {"peak": max(measured.values()), **measured}


def peak_of_step(call: Callable[[], Any], device: torch.device) -> int:
    """Peak extra memory in bytes of a training step. The call is made once.

    On a CPU this is the resident measurement if the system has it: DeepSpeed reserves a buffer of 2 GB for gradients and touches
    only a part of it, and the allocator would count all of it.
    """
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device)
    resident = _resident_peak(call)
    return _allocator_peak(call) if resident is None else resident


def _cuda_peak(call: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _allocator_peak(call: Callable[[], Any]) -> int:
    # The events are read from the exported trace: the profiler's tables fold the frees of an operator into its
    # allocations, which hides the peak.
    activities = [torch.profiler.ProfilerActivity.CPU]
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it prints two lines per call
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        if change["Device Type"] == 0:
            held += change["Bytes"]
            peak = max(peak, held)
    return peak


def _resident_peak(call: Callable[[], Any]) -> int | None:
    """Peak growth of resident memory in bytes; None if the system has no high-water mark that can be reset."""
    if sys.platform != "linux" or not _CLEAR_REFS.exists():
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM") - before
    del result
    return max(peak, 0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
