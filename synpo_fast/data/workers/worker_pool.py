"""Worker processes that may crash or hang without harm: each call has a deadline, and a lost worker is replaced.

Decoders are C code that meets the world's files. One that crashes takes only its worker along; one that hangs is killed at the
deadline. Its item is tried once more in a fresh worker, then its future raises WorkerLost with the reason.

Workers are new interpreters, not forks: torch with its threads and CUDA lives in the parent. They are started when the first
item comes, together, and kept. They get the callable once, run one thread each and see no GPU. One thread of the parent hands
out items and watches deadlines, so workers stay busy while the caller does something else. How a worker ends with its parent
stands in worker.py, how tensors travel in messages.py.
"""

import contextlib
import os
import pickle
import selectors
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from synpo_fast.data.workers.messages import receive_message
from synpo_fast.data.workers.worker import DONE, READY
from synpo_fast.data.workers.worker_process import WorkerProcess
from synpo_fast.errors import UserError

ATTEMPTS = 2
FAILED_STARTS = 3  # so many workers in a row that end before they are ready: no item can be blamed
START_DEADLINE_S = 300.0


class WorkerLost(RuntimeError):
    """An item that crashed its worker or ran over its deadline, in every attempt."""


class WorkerPool:
    """submit(item) returns a Future of work(item).

    work: a callable that can be pickled and imported elsewhere (nothing from __main__). An exception in it comes back as
        a RuntimeError that holds the worker's traceback.
    deadline_s: for one item.
    started: workers that are there already, which are the pool's from now on.

    Close it, or use it as a context manager; a pool that is merely forgotten closes itself.
    """

    def __init__(
        self,
        work: Callable[[Any], Any],
        *,
        num_workers: int,
        deadline_s: float,
        started: Sequence[WorkerProcess] = (),
    ) -> None:
        if num_workers < 1 or not deadline_s > 0:
            raise UserError(f"need num_workers >= 1 and deadline_s > 0, got {num_workers} and {deadline_s}")
        if not sys.platform.startswith("linux"):
            raise UserError(f"worker processes need Linux (memfd), not {sys.platform}; use num_workers=0")
        self._dispatcher = _Dispatcher(pickle.dumps(work), num_workers, deadline_s, list(started))
        self.close = weakref.finalize(self, self._dispatcher.stop)

    def submit(self, item: Any) -> "Future[Any]":
        return self._dispatcher.submit(item)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers there are now."""
        return [worker.process.pid for worker in list(self._dispatcher.workers)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False)
class _Task:
    item: Any
    future: "Future[Any]" = field(default_factory=Future)
    lost: int = 0


class _Dispatcher:
    """What the pool's thread runs. It knows nothing of the pool, so that a forgotten pool can be collected."""

    def __init__(self, work: bytes, num_workers: int, deadline_s: float, started: list[WorkerProcess]) -> None:
        self.work, self.num_workers, self.deadline_s, self.started = work, num_workers, deadline_s, started
        self.workers: list[WorkerProcess] = []
        self.tasks: deque[_Task] = deque()
        self.failed_starts = 0
        self.lock = threading.RLock()  # a collection under it may run stop()
        self.stopping = False
        self.error: BaseException | None = None
        self.bell, self.bell_rope = socket.socketpair()
        self.bell_rope.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.bell, selectors.EVENT_READ)
        self.thread: threading.Thread | None = None
        self.process_id = os.getpid()

    def submit(self, item: Any) -> "Future[Any]":
        task = _Task(item)
        with self.lock:
            if self.stopping or self.error is not None:
                raise RuntimeError("the worker pool is closed") from self.error
            self.tasks.append(task)
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name="synpo_fast worker pool", daemon=True)
                self.thread.start()
        self.ring()
        return task.future

    def stop(self) -> None:
        if os.getpid() != self.process_id:
            return  # a fork of the parent, which has no thread and no business with the workers
        with self.lock:
            self.stopping = True
        self.ring()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()
        while self.started:
            self.started.pop().end()

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it rings already
            self.bell_rope.send(b"!")

    def run(self) -> None:
        try:
            while not self.stopping:
                self.hand_out()
                self.wait()
        except BaseException as error:  # whoever waits for a future shall see it
            self.error = error
        finally:
            self.shut_down()

    def shut_down(self) -> None:
        """Ends all workers; whoever still waits for a future gets to know."""
        with self.lock:
            self.stopping = True
            tasks = [worker.task for worker in self.workers if worker.task is not None] + list(self.tasks)
        for worker in list(self.workers):
            self.end(worker)
        for task in tasks:
            if task.future.running() or task.future.set_running_or_notify_cancel():
                task.future.set_exception(self.error or RuntimeError("the worker pool was closed"))

    def hand_out(self) -> None:
        with self.lock:
            wanted = bool(self.tasks)
        while wanted and len(self.workers) < self.num_workers:
            self.start(None)
        for worker in list(self.workers):
            while worker.ready and worker.task is None and (task := self.next_task()) is not None:
                worker.task = task
                self.give(worker)

    def next_task(self) -> _Task | None:
        with self.lock:
            while self.tasks:
                task = self.tasks.popleft()
                if task.future.set_running_or_notify_cancel():
                    return task
        return None

    def start(self, task: _Task | None) -> None:
        try:
            worker = self.started.pop() if self.started else WorkerProcess.start(self.deadline_s)
        except OSError:
            self.tasks.extendleft([] if task is None else [task])  # where shut_down() finds it
            raise
        worker.task, worker.deadline = task, time.monotonic() + START_DEADLINE_S
        self.workers.append(worker)
        self.selector.register(worker.connection, selectors.EVENT_READ, worker)
        worker.send(self.work)

    def give(self, worker: WorkerProcess) -> None:
        assert worker.task is not None
        worker.deadline = time.monotonic() + self.deadline_s
        try:
            worker.send(worker.task.item)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:  # an item that can not be sent
            worker.task.future.set_exception(error)
            worker.task = None

    def wait(self) -> None:
        busy = [worker.deadline for worker in self.workers if worker.task is not None or not worker.ready]
        timeout = max(0.0, min(busy) - time.monotonic()) if busy else None
        for key, _ in self.selector.select(timeout):
            if key.data is None:
                self.bell.recv(4096)
            else:
                self.hear(key.data)
        # Answers first: a parent that was held up itself must not blame a worker that was in time.
        now = time.monotonic()
        for worker in list(self.workers):
            if now > worker.deadline and (worker.task is not None or not worker.ready):
                limit = self.deadline_s if worker.ready else START_DEADLINE_S
                self.replace(worker, f"it took longer than {limit:g} s and was stopped")

    def hear(self, worker: WorkerProcess) -> None:
        try:
            kind, content = receive_message(worker.connection)
        except (EOFError, ConnectionResetError):
            self.replace(worker, worker.how_it_ended())
            return
        if not worker.ready:
            if kind != READY:
                raise RuntimeError(f"a worker could not be started:\n{content}")
            worker.ready, self.failed_starts = True, 0
            if worker.task is not None:
                self.give(worker)
            return
        task, worker.task = worker.task, None
        assert task is not None
        if kind == DONE:
            task.future.set_result(content)
        else:
            task.future.set_exception(RuntimeError(f"in a worker process:\n{content}"))

    def replace(self, worker: WorkerProcess, reason: str) -> None:
        self.end(worker)
        task = worker.task
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= FAILED_STARTS:
                worker.task = None
                if task is not None:
                    self.tasks.appendleft(task)
                raise RuntimeError(f"{FAILED_STARTS} workers in a row ended before they were ready: {reason}")
        given_up = worker.ready and task is not None and task.lost + 1 == ATTEMPTS
        if worker.ready and task is not None:
            task.lost += 1
        try:
            self.start(None if given_up else task)
        finally:
            if given_up and task is not None:
                task.future.set_exception(WorkerLost(f"{reason} (attempt {ATTEMPTS})"))

    def end(self, worker: WorkerProcess) -> None:
        self.workers.remove(worker)
        self.selector.unregister(worker.connection)
        worker.end()
