"""Runs that are told to stop: by Ctrl-C, by a launcher that dies, by a disk that takes no more lines."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from synpo_fast.run_folder.checkpoint import CheckpointError, checkpoint_problem, newest_checkpoint
from synpo_fast.terminal.progress import Progress
from synpo_fast.terminal.stopping import Interrupted, Stopper, is_broken, launcher_links
from synpo_fast.training import start
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import MetricsLog, read_metrics
from tests.world import environment, options, train_command

LONG = {"max_steps": 100_000, "save_steps": 0, "report": False}


@contextlib.contextmanager
def started(command):
    """The process, in a session of its own; whatever is left of that is killed at the end."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        yield process
    finally:
        for each in of_session(process.pid):
            each.kill()
        process.stdout.close()
        process.wait()


def of_session(session):
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def wait_for(happened, seconds=200):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def steps_in(folder):
    return len(read_metrics(folder / "metrics.jsonl"))


def test_ctrl_c_saves_and_a_second_one_ends_at_once(world, tmp_path):
    """A terminal sends Ctrl-C to the worker processes too. Then the run is resumed, and interrupted twice."""
    values = options(world, tmp_path / "out", **LONG, dataloader_num_workers=1, resume="auto")
    with started(train_command(values)) as process:
        wait_for(lambda: steps_in(tmp_path / "out") > 2)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 130
        assert "stopped by SIGINT at step" in output and "Traceback" not in output
        assert not of_session(process.pid)
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{steps_in(tmp_path / 'out'):06d}"
    # A step that takes for ever: the first Ctrl-C waits for its end, the second does not.
    code = (
        "import sys, time; from synpo_fast.training import loop; from synpo_fast.train import main\n"
        "loop.train_step = lambda run, batch: [print('in a step', flush=True), time.sleep(600)]\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    with started([sys.executable, "-c", code, *train_command(values)[3:]]) as process:
        wait_for(lambda: "in a step" in process.stdout.readline())
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 130 and "ended by a second SIGINT" in output
        wait_for(lambda: not of_session(process.pid), 30)
    assert checkpoint_problem(checkpoint) is None and newest_checkpoint(tmp_path / "out") == checkpoint


@pytest.mark.parametrize("blocked", [False, True], ids=["python", "in a call of C"])
def test_while_a_model_is_loaded_it_just_ends(world, tmp_path, blocked):
    """Outside of training there is nothing to save. A call that does not come back to Python is not waited for."""
    wait = "ctypes.CDLL(None).sleep(600)" if blocked else "time.sleep(600)"
    code = (
        "import sys, time, ctypes; from synpo_fast.terminal import stopping\n"
        "from synpo_fast.training import start; from synpo_fast.train import main\n"
        "stopping.PATIENCE_S = 2\n"
        f"def load(*_):\n    print('at the model', flush=True)\n    while True: {wait}\n"
        "start.build_model = load\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    values = options(world, tmp_path / "out", **LONG)
    with started([sys.executable, "-c", code, *train_command(values)[3:]]) as process:
        wait_for(lambda: "at the model" in process.stdout.readline())
        process.send_signal(signal.SIGINT if not blocked else signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == (143 if blocked else 130) and "Traceback" not in output
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name != "run.lock"] == []


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_the_deepspeed_command_leaves_no_orphans(world, tmp_path, port, sign):
    """Only the command gets the signal, and does not pass it on. Two ranks and their workers save and end."""
    values = options(world, tmp_path / "out", **LONG, dataloader_num_workers=1, gradient_accumulation_steps=2)
    with started(train_command(values, num_ranks=2, port=port)) as process:
        wait_for(lambda: steps_in(tmp_path / "out") > 2)
        assert len(of_session(process.pid)) >= 6  # the command, its launcher, two ranks, two workers
        process.send_signal(sign)
        process.wait(timeout=60)
        wait_for(lambda: not of_session(process.pid), 60)
        output = process.stdout.read()
    assert "stopped by the end of its launcher at step" in output and "Traceback" not in output
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{steps_in(tmp_path / 'out'):06d}"


def test_without_a_launcher_the_parent_may_go():
    assert launcher_links() == []  # pytest's parent is none
    code = "import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert not is_broken([(child.pid, os.getpid())])
        assert is_broken([(child.pid, -1)])
    finally:
        child.kill()
        child.wait()
    assert is_broken([(child.pid, os.getpid())])


def test_a_stopper_notes_only_the_first_reason_and_puts_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    stopper = Stopper()
    with stopper.installed(), stopper.saves_at_the_end_of_a_step():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert (stopper.reason, stopper.status) == ("SIGTERM", 0)
    assert signal.getsignal(signal.SIGTERM) == before
    stopper = Stopper()
    with pytest.raises(Interrupted, match="stopped by SIGHUP"), stopper.installed():
        signal.raise_signal(signal.SIGHUP)
    assert not [thread for thread in threading.enumerate() if thread.name == "synpo_fast stop" and gone(thread)]


def gone(thread):
    thread.join(timeout=5)
    return thread.is_alive()


def test_a_stop_during_evaluation_ends_it_and_saves(world, tmp_path, in_one_process, monkeypatch):
    from synpo_fast.training import evaluation_loop, start

    stopper = Stopper()
    original = evaluation_loop.Evaluator.evaluate

    def evaluate(self, engine, step, stop):
        stopper.reason = "SIGINT" if step == 2 else None
        return original(self, engine, step, stop=stop)

    monkeypatch.setattr(evaluation_loop.Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(start, "Stopper", lambda: stopper)
    values = options(world, tmp_path / "out", max_steps=4, save_steps=0, eval_split=0.2, eval_steps=2, max_new_tokens=4)
    state = in_one_process(values)
    assert (state.step, state.stopped_early) == (2, True)
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-000002"
    evaluated = [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "eval_loss" in row]
    assert evaluated == [0]


def full(monkeypatch, at):
    original = MetricsLog.log

    def log(self, step, numbers):
        if step == at:
            self._stream = open("/dev/full", "w")  # noqa: SIM115
        original(self, step, numbers)

    monkeypatch.setattr(MetricsLog, "log", log)


@pytest.mark.parametrize(("at", "error"), [(3, TrainingStopped), (4, CheckpointError), (6, CheckpointError)])
def test_a_line_that_does_not_fit_the_disk_is_the_reason_given(world, tmp_path, in_one_process, monkeypatch, at, error):
    """In a step, in one that saves, and in the last one; with a resume the run ends as if nothing had been."""
    values = options(world, tmp_path / "out", save_steps=2, gradient_accumulation_steps=1)
    with monkeypatch.context() as patch:
        full(patch, at)
        with pytest.raises((TrainingStopped, CheckpointError), match=f"metrics of step {at} .*No space left"):
            in_one_process(values)
    assert newest_checkpoint(tmp_path / "out").name == f"checkpoint-00000{(at - 1) // 2 * 2}"
    in_one_process({**values, "resume": "auto"})
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_on_one_rank_ends_all(world, tmp_path, port):
    """No file may grow beyond 8 kB, as if the disk were full: metrics.jsonl reaches that after some steps."""
    values = options(world, tmp_path / "out", lora_r=2, max_steps=2, report=False, gradient_accumulation_steps=2)
    values |= {"save_steps": 0, "resume": "auto"}
    command = train_command(values, num_ranks=2, port=port)
    environ = environment()
    assert subprocess.run(command, env=environ, capture_output=True, timeout=200).returncode == 0
    done = subprocess.run(
        train_command({**values, "max_steps": 1000}, num_ranks=2, port=port), env=environ, capture_output=True, text=True,
        timeout=200, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr[-3000:]
    assert "could not be written" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-000002"


def test_a_terminal_that_is_gone_does_not_end_a_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w"))  # noqa: SIM115
    progress = Progress(shows=True, bar=False, first_step=0, num_steps=3, every=1)
    progress.say("x")
    progress.show(1, {"loss": 1.0})
    assert not progress.shows


def test_workers_leave_signals_to_their_parent(tmp_path):
    from synpo_fast.data.workers.worker_pool import WorkerPool

    with WorkerPool(Path, num_workers=1, deadline_s=30) as pool:
        assert pool.submit("a").result() == Path("a")
        (worker,) = pool.process_ids
        for each in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, each)
        assert pool.submit("b").result() == Path("b") and pool.process_ids == [worker]
    assert not psutil.pid_exists(worker)


def test_what_stopped_another_rank_is_named(monkeypatch, group):
    """The rank that prints may not have noticed anything itself."""

    def gathered(answers, own):
        answers[:] = [own, "the end of its launcher"]

    monkeypatch.setattr(start.dist, "all_gather_object", gathered)
    assert start._why_stopped(Stopper()) == "the end of its launcher"
