"""One optimiser step on all ranks. The training loop takes it, and a profile measures it.

Ranks agree on the number of micro-batches. Each micro-batch runs forward, loss and backward; then the optimiser steps. A rank
with fewer micro-batches than another runs a placeholder pair of weight 0 instead, because collectives inside forward and
backward wait for every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.encoding import BadPair
from synpo_fast.data.loader import StepBatch
from synpo_fast.models.batching import micro_batches, packed_tokens
from synpo_fast.training.engine import Engine, StepOutcome
from synpo_fast.training.metrics import Numbers, add_sums
from synpo_fast.training.out_of_memory import MicroBatchTooLarge, tokens_of
from synpo_fast.training.reward_gradients import reward_gradient_norms
from synpo_fast.training.unusable_pairs import OUT_OF_MEMORY

MicroBatches = list[tuple[list[EncodedPair], float]]  # each with weight 1, or 0 for a placeholder


@dataclass(frozen=True, eq=False)
class StepTaken:
    """The result of one optimiser step.

    batch: the pairs that the step used; pairs that did not fit the memory are in batch.bad. sums: this rank's metric sums.
    diagnostics: gradient norms of the rewards, if requested."""

    batch: StepBatch
    sums: dict[str, torch.Tensor]
    outcome: StepOutcome
    diagnostics: Numbers


@dataclass(eq=False)
class Stepper:
    """Takes optimiser steps with one engine.

    placeholder: the pair that this rank runs if it has fewer micro-batches than others; None before any rank has a pair."""

    config: TrainConfig
    engine: Engine
    device: torch.device
    placeholder: EncodedPair | None = None

    def take(self, batch: StepBatch, *, seed: int, learning_rate: float, diagnose: bool = False) -> StepTaken:
        """Takes one step with this rank's pairs. seed: for the random numbers of the step, such as dropout.

        Nothing is read from the device between the first forward and the last backward, so the host runs ahead of a GPU. It waits
        at the end for the gradient norm, which decides whether the step is applied. With several ranks it also waits at the
        beginning, to agree on the number of forwards.

        Raises MicroBatchTooLarge if a micro-batch does not fit the memory, except under oom_policy=skip.
        """
        engine = self.engine
        diagnostics: Numbers = {}
        micros, pairs_in_step = self.agree_on_micro_batches(batch)
        if diagnose:
            diagnostics = reward_gradient_norms(engine.module, [micro for micro, weight in micros if weight])
        sums, too_large = self._gradients(micros, pairs_in_step, seed)
        while self.config.oom_policy == "skip" and any_rank(too_large is not None, self.device):
            # All ranks repeat the step: the other pairs weigh more in the mean, and the failed backward left partial gradients.
            engine.discard_gradients()
            if too_large is not None:
                batch = _without(batch, micros[too_large][0], self.device)
            micros, pairs_in_step = self.agree_on_micro_batches(batch)
            sums, too_large = self._gradients(micros, pairs_in_step, seed)
        outcome = engine.step(learning_rate) if micros else StepOutcome(False, 0.0)
        return StepTaken(batch, sums, outcome, diagnostics)

    def agree_on_micro_batches(self, batch: StepBatch) -> tuple[MicroBatches, int]:
        """Returns this rank's micro-batches with weight 1, padded with placeholders of weight 0 to the largest number of any
        rank, and the number of pairs on all ranks: of comparisons, for rows that have several. The list is empty if no rank has
        a pair."""
        groups = micro_batches(
            [pair.sample for pair in batch.pairs],
            max_pairs=self.config.per_device_train_batch_size,
            max_tokens=self.config.max_batch_tokens,
        )
        micros = [([batch.pairs[index] for index in group], 1.0) for group in groups]
        if batch.pairs:
            self.placeholder = min(batch.pairs, key=lambda pair: packed_tokens(pair.sample))
        most, pairs_in_step, self.placeholder = agree_on_forwards(
            len(micros), sum(pair.num_pairs for pair in batch.pairs), self.placeholder, self.device
        )
        assert self.placeholder is not None or not most
        micros += [([self.placeholder], 0.0) for _ in range(most - len(micros)) if self.placeholder is not None]
        return micros, pairs_in_step

    def _gradients(
        self, micros: MicroBatches, pairs_in_step: int, seed: int
    ) -> tuple[dict[str, torch.Tensor], int | None]:
        """Accumulates the micro-batches' gradients in the engine and returns their metric sums and None. Under oom_policy=skip it
        stops at a micro-batch that does not fit the memory, and returns no sums and that micro-batch's index."""
        engine = self.engine
        torch.manual_seed(seed)
        sums: dict[str, torch.Tensor] = {}
        for place, (micro, weight) in enumerate(micros):
            try:
                loss, more = engine.forward(micro, weight * engine.world_size / max(1, pairs_in_step))
                if place + 1 < len(micros):  # the copies run during the backward
                    engine.module.policy.begin_copies([pair.sample for pair in micros[place + 1][0]])
                engine.backward(loss)
            except torch.OutOfMemoryError as error:
                if self.config.oom_policy == "skip" and weight:
                    return {}, place
                raise MicroBatchTooLarge(micro) from error
            if weight:
                add_sums(sums, more)
        return sums, None


def agree_on_forwards(
    micros: int, pairs: int, placeholder: EncodedPair | None, device: torch.device
) -> tuple[int, int, EncodedPair | None]:
    """Returns the largest number of micro-batches of any rank, the number of pairs of all ranks, and a placeholder pair. A rank
    that has had no pair receives another rank's; the placeholder is None only while no rank has had one."""
    if dist.get_world_size() == 1:
        return micros, pairs, placeholder
    facts = torch.tensor([pairs, micros, placeholder is not None], device=device)
    every = [torch.zeros_like(facts) for _ in range(dist.get_world_size())]
    dist.all_gather(every, facts)
    rows = torch.stack(every).tolist()
    most = max(row[1] for row in rows)
    if most and not all(row[2] for row in rows):
        parcel: list[Any] = [placeholder]
        source = next(rank for rank, row in enumerate(rows) if row[2])
        dist.broadcast_object_list(parcel, src=source, device=device)
        placeholder = placeholder or parcel[0]
    return most, sum(row[0] for row in rows), placeholder


def any_rank(value: bool, device: torch.device) -> bool:
    """True if `value` is true on some rank; the same answer on all ranks."""
    if dist.get_world_size() == 1:
        return value
    flag = torch.full((), float(value), device=device)
    dist.all_reduce(flag)
    return bool(flag > 0)


def _without(batch: StepBatch, dropped: Sequence[EncodedPair], device: torch.device) -> StepBatch:
    """Returns the batch without the pairs that did not fit the memory; these count as pairs that could not be used."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    gone = {id(pair) for pair in dropped}
    bad = [BadPair(pair.id, f"{OUT_OF_MEMORY} ({tokens_of(pair)})") for pair in dropped]
    return replace(batch, pairs=[pair for pair in batch.pairs if id(pair) not in gone], bad=[*batch.bad, *bad])
