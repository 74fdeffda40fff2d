"""Shared by all benchmarks: the record of the machine, number formats, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "liger_kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "cuda-tile",
    "deepspeed",
    "peft",
    "av",
)


def environment(device: torch.device) -> dict[str, Any]:
    """The facts a reader needs to judge a figure: processor, driver, clocks, threads, versions, commit."""
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
    """Driver, clocks, power limit and temperature from nvidia-smi; empty if there is no nvidia-smi."""
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
    """The output of a command, or None if the command is missing, fails or prints nothing."""
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
    """Returns rows as text with columns padded by spaces, except the last column, which may be long."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header) - 1)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def read_record(
    parser: argparse.ArgumentParser, file: Path, *, script: str, part: Callable[[Any], Any]
) -> dict[str, Any]:
    """The JSON that a script wrote with --json. Any other file ends the program through parser.error: one line, status 2.

    part: gives what will be used of the record; an error or an empty value means that another script wrote it.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{file} cannot be read: {error.strerror or error}")
    except ValueError:
        parser.error(f"{file} is not JSON: give a file that benchmarks/{script} wrote with --json")
    try:
        found = record["environment"] and part(record)
    except (KeyError, TypeError):
        found = None
    if not found:
        parser.error(f"{file} holds nothing to draw: give a file that benchmarks/{script} wrote with --json")
    return record


def write_json(path: str | Path, record: dict[str, Any]) -> None:
    """Writes the record as JSON. Raises ValueError for a NaN, which JSON does not have."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
