"""The steps that a profile measures: the first ones of training, held in memory, and how long they take to read.

Waiting for data cannot be watched while variants take turns: with every batch used many times, the next one is always
there. So the reading is timed by itself, before anything else runs. With workers a step waits for what its reading
takes longer than its computing, and without them for all of it.
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

MOST_BATCHES = 4  # in memory with their pixels, and used again when there are more rounds


@dataclass(frozen=True, eq=False)
class ProfiledStep:
    """batch: this rank's part of a step. The counts are of all ranks. reading_s: how long this rank reads for it."""

    batch: StepBatch
    pairs: int
    responses: int
    prompt_tokens: int
    response_tokens: int
    reading_s: float

    @property
    def samples(self) -> list[Sample]:
        """This rank's, each once."""
        return [pair.sample for pair in self.batch.pairs]

    def wait_s(self, computing_s: float, reads_ahead: bool) -> float:
        return max(0.0, self.reading_s - computing_s) if reads_ahead else self.reading_s


def read_steps(config: TrainConfig, loader: PairLoader) -> list[ProfiledStep]:
    """The first steps of training that every rank has pairs for. The very first is left out where there are
    others: its reading is slow to start."""
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
        raise UserError(f"no step of {config.train_file} has a pair that can be used on every process{why}")
    mean = sum(waits) / max(1, len(waits))
    steps = []
    for batch in batches[-wanted:]:
        # Who reads ahead does it unevenly: of their reading only the mean says something.
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
    """This rank's value and those of all others, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
