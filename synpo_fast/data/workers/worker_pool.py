"""A pool of worker processes that survives crashes and hangs: each call has a deadline, and a lost worker is replaced.

Decoders are C code that reads files from anywhere. A decoder that crashes ends only its worker; one that hangs is killed at the
deadline. The item is tried once more in a new worker. If that fails too, its future raises WorkerLost with the reason.

Workers are new interpreters, not forks, because the parent runs torch with its threads and CUDA. All of them start with the
first item and are kept. They receive the callable once, use one thread each and see no GPU. One thread of the parent assigns
items and checks deadlines, so workers stay busy while the caller does something else. worker.py explains how a worker ends with
its parent, messages.py how tensors are sent.
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
FAILED_STARTS = 3  # consecutive workers that end before they are ready: the cause cannot be an item
START_DEADLINE_S = 300.0


class WorkerLost(RuntimeError):
    """Raised for an item that crashed its worker or exceeded its deadline in every attempt."""


class WorkerPool:
    """Runs work(item) in worker processes; submit(item) returns a Future.

    work: a callable that can be pickled and imported elsewhere (nothing from __main__). An exception in it is raised in the
        parent as a RuntimeError with the worker's traceback.
    deadline_s: seconds for one item.
    started: workers that already run; the pool owns them from now on.

    Close it, or use it as a context manager. A pool without references closes itself.
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
        """The process ids of the current workers."""
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
    """The code of the pool's thread. It holds no reference to the pool, so that an unused pool can be garbage-collected."""

    def __init__(self, work: bytes, num_workers: int, deadline_s: float, started: list[WorkerProcess]) -> None:
        self.work, self.num_workers, self.deadline_s, self.started = work, num_workers, deadline_s, started
        self.workers: list[WorkerProcess] = []
        self.tasks: deque[_Task] = deque()
        self.failed_starts = 0
        self.lock = threading.RLock()  # a garbage collection while it is held may call stop()
        self.stopping = False
        self.error: BaseException | None = None
        self.wake_reader, self.wake_writer = socket.socketpair()
        self.wake_writer.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.wake_reader, selectors.EVENT_READ)
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
        self.wake()
        return task.future

    def stop(self) -> None:
        if os.getpid() != self.process_id:
            return  # a fork of the parent: it has no thread and does not own the workers
        with self.lock:
            self.stopping = True
        self.wake()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()
        while self.started:
            self.started.pop().end()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full buffer wakes the thread as well
            self.wake_writer.send(b"!")

    def run(self) -> None:
        try:
            while not self.stopping:
                self.assign_tasks()
                self.wait()
        except BaseException as error:  # shut_down() passes it to all pending futures
            self.error = error
        finally:
            self.shut_down()

    def shut_down(self) -> None:
        """Ends all workers and sets an exception on every pending future."""
        with self.lock:
            self.stopping = True
            tasks = [worker.task for worker in self.workers if worker.task is not None] + list(self.tasks)
        for worker in list(self.workers):
            self.end(worker)
        for task in tasks:
            if task.future.running() or task.future.set_running_or_notify_cancel():
                task.future.set_exception(self.error or RuntimeError("the worker pool was closed"))

    def assign_tasks(self) -> None:
        with self.lock:
            wanted = bool(self.tasks)
        while wanted and len(self.workers) < self.num_workers:
            self.start(None)
        for worker in list(self.workers):
            while worker.ready and worker.task is None and (task := self.next_task()) is not None:
                worker.task = task
                self.send_task(worker)

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
            self.tasks.extendleft([] if task is None else [task])  # so that shut_down() finds it
            raise
        worker.task, worker.deadline = task, time.monotonic() + START_DEADLINE_S
        self.workers.append(worker)
        self.selector.register(worker.connection, selectors.EVENT_READ, worker)
        worker.send(self.work)

    def send_task(self, worker: WorkerProcess) -> None:
        assert worker.task is not None
        worker.deadline = time.monotonic() + self.deadline_s
        try:
            worker.send(worker.task.item)
        except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:  # an item that cannot be pickled
            worker.task.future.set_exception(error)
            worker.task = None

    def wait(self) -> None:
        busy = [worker.deadline for worker in self.workers if worker.task is not None or not worker.ready]
        timeout = max(0.0, min(busy) - time.monotonic()) if busy else None
        for key, _ in self.selector.select(timeout):
            if key.data is None:
                self.wake_reader.recv(4096)
            else:
                self.receive_from(key.data)
        # After reading answers: if the parent itself was delayed, a worker that answered in time must not be replaced.
        now = time.monotonic()
        for worker in list(self.workers):
            if now > worker.deadline and (worker.task is not None or not worker.ready):
                limit = self.deadline_s if worker.ready else START_DEADLINE_S
                self.replace(worker, f"it took longer than {limit:g} s and was stopped")

    def receive_from(self, worker: WorkerProcess) -> None:
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
                self.send_task(worker)
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
