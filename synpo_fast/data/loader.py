"""What a rank trains on, step by step: pairs in the epoch's order, decoded and encoded ahead of time.

A position is (epoch, step) and nothing else: what a step holds follows from it, the seed, the rank and the files alone, not
from the number of workers, from what was prefetched or from who was faster. So a run that was killed goes on with exactly the
pairs that were left.

A pair whose video can not be decoded, that is too long, or that crashes its worker makes this rank's step smaller and is
reported in it; all other steps stay as they are. Ranks agree on the number of steps, not on the number of pairs: a step with
no good pair at all is a step too.
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
WORKER_SLACK_S = 5.0  # a worker is stopped that much later than the decoder stops by itself


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One rank's part of one global step.

    pairs: the good ones, in order. wanted: how many there should have been. bad: the others, with reasons.
    wait_s: how long the caller waited for it.
    """

    epoch: int
    step: int
    pairs: list[EncodedPair]
    wanted: int
    bad: list[BadPair]
    wait_s: float


class PairLoader:
    """pairs_per_step: of this rank. num_workers: processes that decode and encode; 0 does it in the caller's process: when a
    step is asked for, or for a GPU ahead of time in a thread. prefetch_steps: how many steps are read ahead, across the
    end of a shuffled epoch too. prefetch_bytes: how many bytes of them are held at most besides the step the caller holds;
    fewer steps are read ahead where they are large, but the next one always and whole.

    backend: of decode_frames. device: where frames are decoded and made into pixels; a CUDA device needs num_workers=0.
    keyed: videos get a key by which feature caches and precomputed references know them (video_key.py), made where they are
    read; without it their content is hashed when it is asked for. find_stored: looks up stored features by that key
    (StoredVideos.find); a video that is found comes with its features and is not decoded.
    deadline_s: for one pair. A worker that takes longer is stopped, and the pair tried once more in a fresh one.
    started: workers that are there already, of EarlyWorkers.

    Use it as a context manager, or close it.
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
        step_positions(0, rank, world_size, pairs_per_step)  # checks them
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
            # A little later than the decoder's own deadline, whose message says more.
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
        """The steps of an epoch from start_step on. Starting another iteration ends this one."""
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
        """Ends the workers. The loader can not be used afterwards."""
        self._closed = True
        self._ahead.drop()
        self._source.close()

    @property
    def process_ids(self) -> list[int]:
        """Of the workers there are now."""
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
                yield self._step(epoch, step)  # not kept here as well while the next one is awaited
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
        """Has the prefetch_steps steps from (epoch, step) on read, as far as they may be held."""
        steps = self._ahead.steps
        if steps and (steps[0].epoch, steps[0].step) != (epoch, step):
            self._ahead.drop()
        for place in range(self.prefetch_steps):
            if not self.shuffle and step == self.steps_per_epoch:
                break  # an evaluation ends with its epoch
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
