"""Loads the steps of one rank: pairs in the epoch's order, decoded and encoded ahead of time.

A position is (epoch, step) and nothing else. The content of a step depends only on its position, the seed, the rank and the
files. It does not depend on the number of workers, on prefetching or on timing. So a run that was killed resumes with exactly
the pairs that were left.

A pair whose video cannot be decoded, that is too long, or that crashes its worker is left out. This rank's step becomes smaller
and reports the pair; all other steps are unchanged. Ranks agree on the number of steps, not on the number of pairs: a step
without any good pair is still a step.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from synpo_fast.data.encoded import EncodedPair, Encoder, FindStored
from synpo_fast.data.encoding import BadPair, PairReader, ReadInThread, ReadOnDemand
from synpo_fast.data.order import epoch_order, num_steps, step_positions
from synpo_fast.data.pair import Pair
from synpo_fast.data.read_ahead import PendingStep, ReadAhead, Slot
from synpo_fast.data.video.decode import BACKENDS
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video_key import reading_facts
from synpo_fast.data.workers.worker_pool import WorkerLost, WorkerPool
from synpo_fast.data.workers.worker_process import WorkerProcess

PREFETCH_BYTES = 2 << 30
WORKER_SLACK_S = 5.0  # a worker is killed this long after the decoder's own deadline


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One rank's part of one global step.

    pairs: the good pairs, in order. wanted: the number of pairs, good and bad. bad: the pairs left out, with reasons.
    wait_s: the time in seconds that the caller waited for this step.
    """

    epoch: int
    step: int
    pairs: list[EncodedPair]
    wanted: int
    bad: list[BadPair]
    wait_s: float


class PairLoader:
    """Yields one rank's StepBatches, with worker processes that decode and encode ahead.

    Args:
        pairs_per_step: pairs that this rank takes per step.
        num_workers: processes that decode and encode. With 0 the caller's process does it: when a step is requested or, for a
            GPU, ahead of time in a thread.
        prefetch_steps: steps to read ahead, also across the end of a shuffled epoch.
        prefetch_bytes: the most bytes that steps read ahead may hold, not counting the step that the caller holds. If steps are
            large, fewer are read ahead. The next step is always read in full.
        backend: see decode_frames.
        device: where frames are decoded and turned into pixels; a CUDA device needs num_workers=0.
        keyed: the reading process gives every video a key (video_key.py), by which feature caches and precomputed references
            find it. Without a key the pixels are hashed when one is needed.
        find_stored: looks up stored features by that key (StoredVideos.find). A video with stored features is not decoded.
        deadline_s: seconds for one pair. A worker that takes longer is killed, and the pair is tried once more in a new one.
        started: workers that already run, from EarlyWorkers.

    Use it as a context manager, or call close().
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        encoder: Encoder,
        *,
        sampling: FrameSampling,
        pairs_per_step: int,
        video_root: str | Path | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 2,
        prefetch_steps: int = 2,
        prefetch_bytes: int = PREFETCH_BYTES,
        backend: str = "auto",
        device: str | torch.device = "cpu",
        deadline_s: float = 30.0,
        keyed: bool = False,
        find_stored: FindStored | None = None,
        started: Sequence[WorkerProcess] = (),
    ) -> None:
        if not pairs:
            raise ValueError("there are no pairs to load")
        if num_workers < 0 or prefetch_steps < 1:
            raise ValueError(f"need num_workers >= 0 and prefetch_steps >= 1, got {num_workers} and {prefetch_steps}")
        if prefetch_bytes < 0:
            raise ValueError(f"prefetch_bytes may not be negative, got {prefetch_bytes}")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s must be positive, got {deadline_s}")
        device = torch.device(device)
        if device.type != "cpu" and num_workers:
            raise ValueError(f"workers see no GPU: device={str(device)!r} needs num_workers=0, got {num_workers}")
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
        step_positions(0, rank, world_size, pairs_per_step)  # raises ValueError for bad values
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.pairs, self.seed, self.shuffle = pairs, seed, shuffle
        self.rank, self.world_size, self.pairs_per_step = rank, world_size, pairs_per_step
        self.prefetch_steps = prefetch_steps
        self.steps_per_epoch = num_steps(len(pairs), world_size=world_size, pairs_per_rank=pairs_per_step)
        reader = PairReader(encoder, sampling, video_root, backend, device, deadline_s)
        if keyed or find_stored is not None:
            facts = reading_facts(encoder, sampling, backend, device)
            reader = replace(reader, facts=facts, find_stored=find_stored)
        self._source: WorkerPool | ReadInThread | ReadOnDemand
        if num_workers:
            # The decoder's own deadline comes first: its error message says more.
            self._source = WorkerPool(
                reader, num_workers=num_workers, deadline_s=deadline_s + WORKER_SLACK_S, started=started
            )
        elif device.type != "cpu":
            self._source = ReadInThread(reader)
        else:
            self._source = ReadOnDemand(reader)
        self._ahead = ReadAhead(self._source, prefetch_bytes)
        self._orders: dict[int, list[int]] = {}
        self._iteration = 0
        self._closed = False

    def steps(self, epoch: int, start_step: int = 0) -> Iterator[StepBatch]:
        """Yields the steps of an epoch from start_step on. Starting another iteration ends this one."""
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"need epoch >= 0 and 0 <= start_step <= {self.steps_per_epoch}, got epoch={epoch} and "
                f"start_step={start_step}"
            )
        if self._closed:
            raise RuntimeError("the loader is closed")
        self._iteration += 1
        return self._steps(epoch, start_step, self._iteration)

    def close(self) -> None:
        """Ends the workers. The loader cannot be used afterwards."""
        self._closed = True
        self._ahead.drop()
        self._source.close()

    @property
    def process_ids(self) -> list[int]:
        """The process ids of the current workers."""
        return self._source.process_ids

    def __enter__(self) -> "PairLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _steps(self, epoch: int, start_step: int, iteration: int) -> Iterator[StepBatch]:
        finished = False
        try:
            for step in range(start_step, self.steps_per_epoch):
                if iteration != self._iteration:
                    raise RuntimeError(
                        f"the loader has begun another iteration; this one was at step {step} of {epoch}"
                    )
                # Not kept in a variable, which would hold this step in memory while the next one is read.
                yield self._step(epoch, step)
            finished = True
        finally:
            if not finished and iteration == self._iteration:
                self._ahead.drop()

    def _step(self, epoch: int, step: int) -> StepBatch:
        self._read_ahead(epoch, step)
        batch = self._collect(epoch, step)
        self._read_ahead(*self._next(epoch, step))
        return batch

    def _read_ahead(self, epoch: int, step: int) -> None:
        """Submits the prefetch_steps steps from (epoch, step) on, as far as prefetch_bytes allows."""
        steps = self._ahead.steps
        if steps and (steps[0].epoch, steps[0].step) != (epoch, step):
            self._ahead.drop()
        for place in range(self.prefetch_steps):
            if not self.shuffle and step == self.steps_per_epoch:
                break  # an evaluation reads nothing beyond its epoch
            if place == len(steps):
                self._ahead.add(self._pending(epoch, step))
            epoch, step = self._next(epoch, step)
        self._ahead.submit()

    def _next(self, epoch: int, step: int) -> tuple[int, int]:
        if self.shuffle and step + 1 == self.steps_per_epoch:
            return epoch + 1, 0
        return epoch, step + 1

    def _pending(self, epoch: int, step: int) -> PendingStep:
        positions = step_positions(step, self.rank, self.world_size, self.pairs_per_step, num_samples=len(self.pairs))
        order = self._order(epoch)
        return PendingStep(epoch, step, [Slot(self.pairs[order[position]]) for position in positions])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = epoch_order(len(self.pairs), seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        return self._orders[epoch]

    def _collect(self, epoch: int, step: int) -> StepBatch:
        begin = time.perf_counter()
        good: list[EncodedPair] = []
        bad: list[BadPair] = []
        for pair, future in self._ahead.take():
            try:
                result = future.result()
            except WorkerLost as error:
                result = BadPair(pair.id, str(error))
            if isinstance(result, BadPair):
                bad.append(result)
            else:
                good.append(result)
        wait_s = time.perf_counter() - begin
        return StepBatch(epoch, step, good, len(good) + len(bad), bad, wait_s)
