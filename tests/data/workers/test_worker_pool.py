"""Workers that crash, hang or are killed: what is lost, what is not, and what is left behind."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import psutil
import pytest
import torch

from synpo_fast.data.workers.worker_pool import WorkerLost, WorkerPool
from tests.data import chores

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(chores.do, num_workers=2, deadline_s=2.0) as pool:
        yield pool


def results(pool, *items):
    return [future.result(60) for future in [pool.submit(item) for item in items]]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(7, dtype=torch.uint8),
        torch.randn(3, 5).t(),
        torch.randn(2, 3).bfloat16(),
        torch.zeros(0, 4),
        torch.tensor(3),
        torch.ones(1).expand(2, 9),
    ],
    ids=["odd bytes", "strided", "bf16", "empty", "scalar", "expanded"],
)
def test_tensors_cross_unchanged(pool, tensor):
    (doubled,) = results(pool, ("double", tensor))
    assert doubled.dtype == tensor.dtype and doubled.shape == tensor.shape
    assert torch.equal(doubled, tensor * 2)
    doubled.add_(1)  # ours to write to


def test_many_results_come_back_each_to_its_item(pool):
    items = [("linger", (0.01 * (k % 3), (k, torch.full((k,), k)))) for k in range(40)]
    for k, (number, tensor) in enumerate(results(pool, *items)):
        assert number == k and torch.equal(tensor, torch.full((k,), k))


def test_a_worker_has_one_thread_and_no_gpu(pool):
    for process, threads, gpus in results(pool, *[("facts", None)] * 4):
        assert process != os.getpid() and threads == 1 and gpus == ""


def test_a_crash_loses_one_worker_and_the_item_is_tried_again(pool, tmp_path):
    results(pool, ("echo", 0))
    before = set(pool.process_ids)
    flag = str(tmp_path / "flag")
    assert results(pool, ("echo", 1), ("crash once", flag), ("echo", 2)) == [1, "done the second time", 2]
    assert len(before & set(pool.process_ids)) == 1 and len(pool.process_ids) == 2


@pytest.mark.parametrize(
    ("chore", "reason"),
    [
        (("crash", signal.SIGSEGV), "its worker process died of SIGSEGV"),
        pytest.param(("exit", 3), "its worker process ended with status 3", marks=pytest.mark.heavy),
        (("hang", 60), "it took longer than 2 s and was stopped"),
    ],
)
def test_what_crashes_or_hangs_twice_is_given_up_with_a_reason(pool, chore, reason):
    bad, good = pool.submit(chore), [pool.submit(("echo", k)) for k in range(5)]
    with pytest.raises(WorkerLost, match=rf"{reason} \(attempt 2\)"):
        bad.result(60)
    assert [future.result(60) for future in good] == list(range(5))
    assert len(pool.process_ids) == 2


def test_an_idle_worker_that_is_killed_is_replaced(pool):
    results(pool, ("echo", 0))
    victim = pool.process_ids[0]
    os.kill(victim, signal.SIGKILL)
    assert results(pool, *[("echo", k) for k in range(6)]) == list(range(6))
    for _ in range(1000):
        if victim not in pool.process_ids:
            break
        time.sleep(0.02)  # it may take a moment to die
    assert victim not in pool.process_ids and len(pool.process_ids) == 2


def test_an_exception_is_raised_here_with_its_traceback(pool):
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*_fail.*KeyError: 'no such thing'"):
        results(pool, ("fail", "no such thing"))
    with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*send_message.*pickle"):  # it cannot travel
        results(pool, ("lambda", None))
    with pytest.raises((pickle.PicklingError, AttributeError)):  # an item that cannot
        results(pool, ("echo", lambda: None))
    futures = [pool.submit(item) for item in [("echo", lambda: None)] * 5 + [("echo", 1)]]
    assert futures[-1].result(60) == 1, "what cannot be sent holds up nobody"
    assert results(pool, ("echo", "still here")) == ["still here"]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (chores.BrokenOnArrival(), "(?s)a worker could not be started:.*this machine lacks a library"),
        pytest.param(
            chores.EndsOnArrival(),
            "3 workers in a row ended before they were ready: .* status 7",
            marks=pytest.mark.heavy,
        ),
    ],
)
def test_workers_that_can_not_start_are_no_fault_of_an_item(work, message):
    with WorkerPool(work, num_workers=1, deadline_s=2.0) as pool:
        futures = [pool.submit(k) for k in range(2)]
        for future in futures:
            with pytest.raises(RuntimeError, match=message):
                future.result(60)
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit(0)


def test_closing_ends_workers_and_whoever_waits():
    pool = WorkerPool(chores.do, num_workers=1, deadline_s=60.0)
    results(pool, ("echo", 0))
    (process,) = pool.process_ids
    running, waiting, cancelled = pool.submit(("hang", 60)), pool.submit(("echo", 1)), pool.submit(("echo", 2))
    assert cancelled.cancel()
    pool.close()
    pool.close()
    assert not psutil.pid_exists(process)
    for future in running, waiting:
        with pytest.raises(RuntimeError, match="the worker pool was closed"):
            future.result(1)
    with pytest.raises(CancelledError):
        cancelled.result(1)
    with pytest.raises(RuntimeError, match="the worker pool is closed"):
        pool.submit(("echo", 1))


def test_a_forgotten_pool_ends_its_workers():
    pool = WorkerPool(chores.do, num_workers=1, deadline_s=60.0)
    results(pool, ("echo", 0))
    (process,) = pool.process_ids
    del pool
    gc.collect()
    assert not psutil.pid_exists(process)


PARENT = """
import time
from synpo_fast.data.workers.worker_pool import WorkerPool
from tests.data import chores
if __name__ == "__main__":
    pool = WorkerPool(chores.do, num_workers=2, deadline_s={deadline})
    ready = set()
    while len(ready) < 2:
        both = [pool.submit(("facts", None)) for _ in range(2)]
        ready |= {future.result()[0] for future in both}
    pool.submit(({chore!r}, (60, 0)))
    pool.submit(({chore!r}, (60, 0)))
    time.sleep(0.5)
    print(*pool.process_ids, flush=True)
    {end}
"""


# A worker that "hangs" holds the interpreter's lock, so that none of its threads can run: the timer in C ends it, a while
# after its deadline. With the others' deadline that would be too late here.
@pytest.mark.parametrize(
    ("end", "how", "chore", "deadline"),
    [
        ("time.sleep(60)", signal.SIGKILL, "linger", 100.0),
        pytest.param("time.sleep(60)", signal.SIGKILL, "hang", 4.0, marks=pytest.mark.heavy),
        pytest.param("time.sleep(60)", signal.SIGTERM, "linger", 100.0, marks=pytest.mark.heavy),
        pytest.param("time.sleep(60)", signal.SIGINT, "linger", 100.0, marks=pytest.mark.heavy),
        pytest.param("raise KeyError", None, "linger", 100.0, marks=pytest.mark.heavy),
    ],
    ids=["kill -9", "kill -9 of a hung one", "SIGTERM", "Ctrl-C", "exception"],
)
def test_nothing_is_left_of_a_parent_that_died(end, how, chore, deadline):
    code = PARENT.replace("{end}", end).replace("{chore!r}", repr(chore)).replace("{deadline}", str(deadline))
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert parent.stdout is not None and parent.stderr is not None
    workers = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    for process in parent.pid, *(worker.pid for worker in workers):
        assert "/dev/shm" not in Path(f"/proc/{process}/maps").read_text(), "no file there that could be left behind"
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does it
    elif how is not None:
        parent.send_signal(how)
    parent.wait(60)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert parent.stderr.read().count("KeyboardInterrupt") == (how == signal.SIGINT), "the parent's own, no worker's"
    parent.stdout.close()
    parent.stderr.close()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_workers >= 1 and deadline_s > 0, got 0 and 1"):
        WorkerPool(chores.do, num_workers=0, deadline_s=1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        WorkerPool(lambda item: item, num_workers=1, deadline_s=1)
