"""Runs the trainer under the deepspeed launcher, as a user does, and shows its progress.

The trainer's whole output goes to log.txt in the run's folder. Events of some kinds (terminal/events.py) are printed. If there is
no new output for some seconds, a line says that the trainer is still running.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import synpo_fast
from synpo_fast.run_folder.checkpoint import newest_checkpoint
from synpo_fast.terminal.events import VARIABLE, EventReader, Kind

QUIET_SECONDS = 5.0
SHOW_SECONDS = 2.0  # at most one step is shown in this time
SHOWN: tuple[Kind, ...] = (
    "run",
    "resuming",
    "reference",
    "step",
    "evaluation",
    "nothing_to_do",
    "finished",
    "stopped",
    "profile",
    "round",
)


class DemoError(RuntimeError):
    """A step of the demo failed; the message ends with the last lines of its output."""


def train(out: Path, recipe: str, options: Mapping[str, Any]) -> Path:
    """Trains in one process, from the newest checkpoint in `out` if there is one, and returns the last checkpoint.

    Uses a GPU if there is one. options: the trainer's options by name, including max_steps. Raises DemoError if it fails.
    """
    done = newest_checkpoint(out)
    if done is not None and done.name == f"checkpoint-{options['max_steps']:06d}":
        print("  already done by an earlier run", flush=True)
        return done
    log = _run(out, recipe, {"resume": "auto", **options}, f"the {recipe} training")
    last = newest_checkpoint(out)
    if last is None:
        raise DemoError(f"the {recipe} training left no checkpoint; its output is in {log}")
    return last


def profile(out: Path, recipe: str, options: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Runs the trainer's --profile in a run's folder and returns the content of profile.json. Raises DemoError if it fails."""
    file = out / "profile.json"
    if file.exists():
        print("  already done by an earlier run", flush=True)
    else:
        _run(out, recipe, {"profile": rounds, **options}, f"the profile of {recipe} and dpo")
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return record


def _run(out: Path, recipe: str, options: Mapping[str, Any], title: str) -> Path:
    """Runs the trainer on one process under the launcher. Returns its log file; DemoError with the log's end if it fails."""
    out.mkdir(parents=True, exist_ok=True)
    words = [word for name, value in options.items() for word in (f"--{name}", _text(value))]
    script = Path(synpo_fast.__file__).parent / "train.py"
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "1",
        "--master_port",
        str(_free_port()),
    ]
    command = [*launcher, str(script), "--recipe", recipe, "--output_dir", str(out), *words]
    log = out / "log.txt"
    status = _run_and_show(command, log)
    if status != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        raise DemoError(f"{title} ended with status {status}; its output is in {log}\n{tail}")
    return log


def _run_and_show(command: list[str], log: Path) -> int:
    """Runs the command, shows its progress and returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.jsonl"
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", VARIABLE: str(events)},
            start_new_session=True,
        )
        try:
            _show(process, log, EventReader(events))
            return process.wait()
        finally:
            if process.poll() is None:  # interrupted: on SIGTERM the trainer saves a checkpoint and ends
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def _show(process: subprocess.Popen[str], log: Path, events: EventReader) -> None:
    """Prints new events until the process closes its output. Each line of output makes us look for new events."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_copy_output, args=(process, lines, log), daemon=True).start()
    started = last_step_shown = time.monotonic()
    line: str | None = ""
    while line is not None:
        quiet = False
        try:
            line = lines.get(timeout=QUIET_SECONDS)
        except queue.Empty:
            quiet = True
        for event in events.new():
            quiet, is_step = False, event.kind == "step"
            if event.kind in SHOWN and (not is_step or time.monotonic() - last_step_shown > SHOW_SECONDS):
                print(f"  {event.text}", flush=True)
                last_step_shown = time.monotonic() if is_step else last_step_shown
        if quiet:
            print(f"  ... still running after {time.monotonic() - started:.0f} s", flush=True)


def _copy_output(process: subprocess.Popen[str], lines: queue.Queue[str | None], log: Path) -> None:
    """Copies the process's output to the log and to `lines`, which gets None at the end."""
    assert process.stdout is not None
    with log.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            lines.put(line.rstrip())
    lines.put(None)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
