"""Workers that are there before their pool: taken over, replaced where they have died, ended where nobody takes them."""

import os

from synpo_fast.data.workers.early_workers import EarlyWorkers
from synpo_fast.data.workers.worker_pool import WorkerPool
from tests.data import chores


def is_there(worker):
    return os.path.exists(f"/proc/{worker.process.pid}")


def test_a_pool_takes_them_over_and_ends_them():
    early = EarlyWorkers(3, 20.0, preload=("json", "no_such_module"))
    workers = early.take(2)
    with WorkerPool(chores.do, num_workers=1, deadline_s=20.0, started=workers) as pool:
        assert pool.submit(("echo", 42)).result(timeout=60) == 42
        assert pool.process_ids[0] in [worker.process.pid for worker in workers]
    assert not any(is_there(worker) for worker in workers), "the one without work, too"
    (left,) = early._waiting
    assert is_there(left)
    early.close()
    assert not is_there(left)


def test_one_that_has_died_meanwhile_is_replaced():
    early = EarlyWorkers(1, 20.0, preload=())
    (worker,) = early.take(1)
    worker.process.kill()
    worker.process.wait()
    with WorkerPool(chores.do, num_workers=1, deadline_s=20.0, started=[worker]) as pool:
        assert pool.submit(("echo", 4)).result(timeout=60) == 4
