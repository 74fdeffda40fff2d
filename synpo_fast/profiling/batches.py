"""The batches that a profile measures: the first steps of training, held in memory, and the time it takes to read them.

The wait for data cannot be measured while variants take turns: every batch is used many times, so the next one is always
ready. Reading is therefore timed separately, before anything else runs. With worker processes a step waits only for the part of
its reading that its computing does not hide; without them it waits for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoding import BadPair, quoted
from synpo_fast.data.loader import PairLoader, StepBatch
from synpo_fast.errors import UserError
from synpo_fast.models.policy import Sample

MOST_BATCHES = 4  # kept in memory with their pixels, and reused if there are more rounds


@dataclass(frozen=True, eq=False)
class ProfiledStep:
    """One step to measure.

    batch: this rank's part of the step. The counts are sums over all ranks. reading_s: seconds this rank takes to read its part.
    """

    batch: StepBatch
    pairs: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    reading_s: float

    @property
    def samples(self) -> list[Sample]:
        """This rank's samples, each once."""
        return [pair.sample for pair in self.batch.pairs]

    def wait_s(self, computing_s: float, reads_ahead: bool) -> float:
        """Seconds that a step of computing_s waits for its data. reads_ahead: True if worker processes read."""
        return max(0.0, self.reading_s - computing_s) if reads_ahead else self.reading_s


def read_steps(config: TrainConfig, loader: PairLoader) -> list[ProfiledStep]:
    """The first steps of training in which every rank has pairs, without the very first if there are others: it is slow to read.

    Raises UserError if there is no such step. All ranks must call this.
    """
    wanted = min(config.profile, MOST_BATCHES)
    batches: list[StepBatch] = []
    waits: list[float] = []
    bad: list[BadPair] = []
    for tried, batch in enumerate(_epochs(loader)):
        bad += batch.bad
        if all(every_rank(bool(batch.pairs))):
            batches.append(batch)
        if tried:
            waits.append(batch.wait_s)
        if len(batches) > wanted or tried >= 2 * loader.steps_per_epoch + wanted:
            break
    if not batches:
        why = f": {quoted(bad)}" if bad else ""
        raise UserError(f"no step of {config.train_file} has a usable pair on every process{why}")
    mean = sum(waits) / max(1, len(waits))
    steps = []
    for batch in batches[-wanted:]:
        # Workers that read ahead deliver batches unevenly, so only their mean reading time is meaningful.
        steps.append(_profiled_step(batch, mean if config.reads_ahead else batch.wait_s))
    return steps


def _epochs(loader: PairLoader) -> Iterator[StepBatch]:
    epoch = 0
    while True:
        yield from loader.steps(epoch)
        epoch += 1


def _profiled_step(batch: StepBatch, reading_s: float) -> ProfiledStep:
    prompt = sum(len(pair.sample.prompt) for pair in batch.pairs)
    response = sum(len(response) for pair in batch.pairs for response in pair.sample.responses)
    responses = sum(len(pair.sample.responses) for pair in batch.pairs)
    ranks = every_rank((len(batch.pairs), responses, prompt, response))
    total = [sum(rank[place] for rank in ranks) for place in range(4)]
    return ProfiledStep(batch, total[0], total[1], total[2], total[3], reading_s)


def every_rank(value: Any) -> list[Any]:
    """The values of all ranks, in rank order. All ranks must call this."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
