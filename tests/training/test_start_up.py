"""Messages and actions of a run before its first step, and its progress lines. Tests check the order of events, not times."""

import fcntl
import logging
import os
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.terminal.console import hide_notes_to_developers
from synpo_fast.terminal.progress import Progress
from synpo_fast.training import engine, run_data, run_model
from tests.world import environment, options

STOP_AT_TORCH = """
import sys

class Stop:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers", "deepspeed"):
            print(f"IMPORT {name}", file=sys.stderr, flush=True)
            sys.exit(7)

sys.meta_path.insert(0, Stop())
from MODULE import main
main(ARGUMENTS)
"""


@pytest.mark.parametrize(("module", "arguments"), [("synpo_fast.train", []), ("synpo_fast.cli", ["train"])])
def test_the_first_line_is_there_before_torch_is_imported(tmp_path, module, arguments):
    code = STOP_AT_TORCH.replace("MODULE", module).replace("ARGUMENTS", repr([*arguments, "--lora_r", "3"]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 7
    assert done.stderr.splitlines() == ["synpo-fast train: loading libraries", "IMPORT torch"]


def test_a_run_says_what_it_does_and_readers_start_before_the_model_loads(
    world, tmp_path, in_one_process, monkeypatch, capsys
):
    events, taken = [], []

    class Early(run_data.EarlyWorkers):
        def __init__(self, count, deadline_s):
            super().__init__(count, deadline_s)
            events.append(f"{count} readers")

        def take(self, count):
            workers = super().take(count)
            taken.extend(worker.process.pid for worker in workers)
            return workers

    load = run_model.load_policy
    monkeypatch.setattr(run_data, "EarlyWorkers", Early)
    monkeypatch.setattr(run_model, "load_policy", lambda *a, **b: events.append("model") or load(*a, **b))
    values = options(
        world, tmp_path / "out", max_steps=1, dataloader_num_workers=1, eval_split=0.25, num_eval_captions=0
    )
    capsys.readouterr()
    in_one_process({**values, "report": False})
    assert events == ["2 readers", "model"]
    assert len(taken) == 2 and not any(os.path.exists(f"/proc/{pid}") for pid in taken), (
        "adopted, and ended with the run"
    )
    shown = [line.split(" ")[0] for line in capsys.readouterr().err.splitlines()]
    said = [word for word in shown if word in ("reading", "loading", "building", "evaluating,", "evaluation:", "step")]
    assert said == ["reading", "loading", "building", "evaluating,", "evaluation:", "step", "evaluation:"]


def records(verbose):
    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", verbose=verbose)
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.levelname)
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        with engine._quiet(config):
            logger.setLevel(logging.WARNING)  # as importing DeepSpeed does
            logger.warning("a banner")
            logger.error("a reason")
        logger.warning("of training")
    finally:
        logger.removeHandler(handler)
    return seen


def test_deepspeeds_banners_are_shown_when_asked_for():
    assert records(verbose=False) == ["ERROR", "WARNING"]
    assert records(verbose=True) == ["WARNING", "ERROR", "WARNING"]


def test_only_libraries_notes_on_their_future_are_hidden():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hide_notes_to_developers()
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            for module in ("transformers.modeling_utils", "torch", "torchless", "synpo_fast.models.policy"):
                warnings.warn_explicit(module, category, "file.py", 1, module)
    kept = [(warning.category.__name__, str(warning.message)) for warning in seen]
    assert ("UserWarning", "transformers.modeling_utils") in kept and ("UserWarning", "torch") in kept
    assert ("FutureWarning", "synpo_fast.models.policy") in kept and ("FutureWarning", "torchless") in kept
    assert not [
        name for name, module in kept if name != "UserWarning" and module.startswith(("transformers", "torch."))
    ]


NUMBERS = {
    "loss": -0.123456, "rewards/margins": -1.5e-7, "grad_norm": 1234.5, "learning_rate": 4.9e-6, "pairs_per_s": 0.01,
    "skipped_pairs": 12345, "step_s": 3600.0,
}  # fmt: skip


def frames_of_bar(columns, monkeypatch):
    """The successive states of a bar of 20,000 steps, as sent to a terminal of that width."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        progress = Progress(shows=True, bar=True, first_step=0, num_steps=20_000, every=1)
        progress._bar.mininterval = 0
        for step in (1, 2, 9_999, 19_999):
            progress.show(step, {**NUMBERS, "loss": -(10.0 ** -(step % 4))})
        progress._bar.disable = True  # or it would draw itself once more when it is collected
    sent = b""
    while part := _read(ours):
        sent += part
    os.close(ours)
    sent = sent.decode()
    return [frame for frame in re.split(r"[\r\n]|\x1b\[A", sent) if "|" in frame]


def _read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # all is read, and the other end closed
        return b""


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_bar_keeps_its_width_and_stays_on_its_line(columns, monkeypatch):
    frames = frames_of_bar(columns, monkeypatch)
    assert len(frames) >= 4
    for frame in frames:
        assert len(frame) <= columns, frame
        assert len(frame.split("|")[1]) == 24, frame
    last = frames[-1]
    assert last.startswith("19999/20000 |") and "1:00:00 left" in last and "loss" in last
    assert ("grad_norm" in last) == (columns >= 100)


def test_the_time_left_is_that_of_steps_alone(capsys):
    progress = Progress(shows=True, bar=True, first_step=4, num_steps=100, every=1)
    for step, seconds in ((5, 500.0), (6, 2.0), (7, 4.0)):
        progress.show(step, {"loss": 1.0, "step_s": seconds})
        progress.note({"eval_loss": 0.5})  # however long it took
    left = [line.rsplit("left ", 1)[1] for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert left == ["?", "3:08", "4:39"]


def test_attention_and_its_reason(world, tmp_path, in_one_process, capsys):
    in_one_process(options(world, tmp_path / "out", max_steps=1))
    lines = capsys.readouterr().err.splitlines()
    assert "attention: synpo_fast_segments, because synpo_fast_varlen needs a CUDA device, got cpu" in lines
