"""Starts worker processes early, so that they import their modules while the model loads."""

from __future__ import annotations

from collections.abc import Sequence

from synpo_fast.data.workers.worker_process import WorkerProcess

PRELOAD = ("synpo_fast.data.encoding", "synpo_fast.data.video.decode_pyav", "transformers.tokenization_utils_base")


class EarlyWorkers:
    """Workers without a pool. `take` passes them to a pool, which then owns them; `close` ends those that were not taken."""

    def __init__(self, count: int, deadline_s: float, preload: Sequence[str] = PRELOAD) -> None:
        self._waiting = [WorkerProcess.start(deadline_s, preload) for _ in range(count)]

    def take(self, count: int) -> list[WorkerProcess]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    def close(self) -> None:
        for worker in self.take(len(self._waiting)):
            worker.end()
