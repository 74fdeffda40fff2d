"""Measures the time from a backend's first import to its first frames, which a new dataloader worker waits for."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import format_seconds, format_table
from benchmarks.contest import Unavailable
from benchmarks.decoding.cases import Case, check_available

ROOT = Path(__file__).resolve().parents[2]
# Runs in a fresh process. The clock starts at the import of the backend, when Python and torch are loaded.
COLD_START = """
import json, sys, time, torch
from pathlib import Path
from benchmarks.contest import Unavailable
from benchmarks.decoding.cases import CONTESTANTS
name, path, device, indices = sys.argv[1], Path(sys.argv[2]), torch.device(sys.argv[3]), json.loads(sys.argv[4])
if device.type == "cuda":
    torch.zeros(1, device=device)
start = time.perf_counter()
frames = CONTESTANTS[name][0](path, indices, device)
if device.type == "cuda":
    torch.cuda.synchronize(device)
print(time.perf_counter() - start)
"""


def first_frames(case: Case, names: Sequence[str], folder: Path, device: torch.device, runs: int) -> dict[str, Any]:
    """Seconds from a backend's first import to its first frames. Each sample is a new process; they run one after another."""
    path = case.clip.file(folder)
    rows: list[dict[str, Any]] = [{"name": name, "skipped": None, "samples": []} for name in names]
    for row in rows:
        try:
            check_available(row["name"], case.clip.codec, device)
        except Unavailable as error:
            row["skipped"] = str(error)
    for _ in range(runs):
        for row in rows:
            if row["skipped"] is not None:
                continue
            command = [sys.executable, "-c", COLD_START, row["name"], str(path), str(device), str(case.indices)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                row["skipped"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
            else:
                row["samples"].append(float(done.stdout.strip().splitlines()[-1]))
    return {"clip": case.clip.name, "num_wanted": len(case.indices), "rows": rows}


def first_table(record: dict[str, Any]) -> str:
    lines = []
    for row in record["rows"]:
        if row["skipped"] is not None:
            lines.append([row["name"], "-", row["skipped"]])
        else:
            middle, least, most = (pick(row["samples"]) for pick in (statistics.median, min, max))
            lines.append([row["name"], format_seconds(middle), f"({format_seconds(least)} - {format_seconds(most)})"])
    title = (
        f"first {record['num_wanted']} frames of {record['clip']} in a fresh process, import of the backend included"
    )
    return f"{title}\n{format_table(['backend', 'median', '(least - most)'], lines)}\n"
