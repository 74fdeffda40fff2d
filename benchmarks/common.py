"""What every benchmark here shares: the record of the machine, interleaved timing, tables and JSON.

Timing. All contestants of a case run once in every round, so a machine that slows down slows them alike; the order
changes direction every round and turns by a place every two, so nobody always follows the same neighbour. Figures are
medians with quartiles; a ratio is the median over the rounds of (own time / the other's time in the same round).
On a GPU a call is timed with events around it, launches and host waits included; on a CPU with perf_counter.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_extra_memory

__all__ = [
    "Timing",
    "environment",
    "format_bytes",
    "format_seconds",
    "format_table",
    "interleave",
    "median_ratio",
    "peak_extra_memory",
    "round_order",
    "summarise",
    "write_json",
]

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger_kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
    "deepspeed",
    "peft",
    "av",
)
# Larger than any GPU's L2 (50 MB on an H100, 60 MB on an H200, 126 MB on a B200).
_L2_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, lower and upper quartile over `rounds` samples."""

    median: float
    low: float
    high: float
    rounds: int


def summarise(samples: Sequence[float]) -> Timing:
    if not samples:
        raise ValueError("no samples to summarise")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def median_ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of samples / base, paired by round."""
    return statistics.median(own / other for own, other in zip(samples, base, strict=True))


ROUNDS_FOR_AN_INTERVAL = 5  # the median of all lies outside the range of n values with probability 2 ** (1 - n)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values with the true median between them nine times in ten or more, whatever their distribution. Of fewer than
    eight, the lowest and the highest; of fewer than ROUNDS_FOR_AN_INTERVAL these hold it less often, three times in four with
    three. (Quartiles are where half of the rounds lie, and narrower than this.)"""
    rising = sorted(values)
    cut = 0
    while 2 * sum(math.comb(len(rising), k) for k in range(cut + 2)) <= 0.1 * 2 ** len(rising):
        cut += 1
    return rising[cut], rising[-1 - cut]


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: every second round backwards, turned by a place every two rounds."""
    turn = round_index // 2 % len(names)
    order = [*names[turn:], *names[:turn]]
    return order[::-1] if round_index % 2 else order


def interleave(
    calls: dict[str, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device,
    cold_l2: bool = False,
    budget_seconds: float = float("inf"),
    min_rounds: int = 3,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every call in every round. No warm-up here: call each once or twice before.

    Stops before `rounds` when `budget_seconds` are spent, but not before `min_rounds`. `cold_l2` writes over the GPU's
    L2 cache before every call. `timer(call) -> seconds` replaces the clock.
    """
    if not calls:
        return {}
    if timer is None:
        timer = _cuda_timer(device, cold_l2) if device.type == "cuda" else _cpu_timer
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    gc.collect()
    frozen = gc.get_freeze_count()
    gc.freeze()  # the collections between rounds look at new objects only
    gc.disable()
    try:
        for round_index in range(rounds):
            for name in round_order(list(calls), round_index):
                samples[name].append(timer(calls[name]))
            gc.collect()
            if round_index + 1 >= min_rounds and time.perf_counter() - start > budget_seconds:
                break
    finally:
        gc.enable()
        if not frozen:  # else the caller had frozen objects of its own
            gc.unfreeze()
    return samples


def _cpu_timer(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _cuda_timer(device: torch.device, cold_l2: bool) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_L2_FLUSH_BYTES, dtype=torch.int8, device=device) if cold_l2 else None
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def timer(call: Callable[[], Any]) -> float:
        if flush is not None:
            flush.zero_()
        torch.cuda.synchronize(device)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
        del result
        return start.elapsed_time(end) / 1e3

    return timer


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a reader needs to judge a figure: processor, driver, clocks, threads, versions, commit."""
    here = str(Path(__file__).resolve().parent)
    record: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _output("git", "-C", here, "rev-parse", "HEAD"),
        "uncommitted": _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no"),
    }
    if hasattr(os, "getloadavg"):
        record["load_average"] = list(os.getloadavg())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            **gpu_state(),
        }
    return record


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power limit and temperature as nvidia-smi tells them; empty where it is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    answer = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    if answer is None:
        return {}
    return dict(zip(fields, (value.strip() for value in answer.splitlines()[0].split(",")), strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def format_seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 100 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def format_bytes(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count / scale < 100 else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"


def format_error(error: float | str | None) -> str:
    if error is None:
        return "-"
    return error if isinstance(error, str) else f"{error:.1e}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces; the last column is free to be long."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Writes the record; a NaN in it is a mistake of ours and raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
