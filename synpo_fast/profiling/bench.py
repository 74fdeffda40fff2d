"""Runs the rounds of a profile: times the variants in turn, compares their losses, and counts each one's memory and FLOPs."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoding import quoted
from synpo_fast.profiling.batches import ProfiledStep, every_rank
from synpo_fast.profiling.counted_flops import count_flops, visible_products
from synpo_fast.profiling.peak_memory import peak_of_step
from synpo_fast.profiling.rounds import round_order
from synpo_fast.profiling.stage_clock import WAIT, StageClock, StageTimes, timed_stages
from synpo_fast.profiling.variants import Variant, VariantSwitch, memory_for
from synpo_fast.terminal.progress import Progress
from synpo_fast.training.engine import Engine
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import means_of, summed_over_ranks
from synpo_fast.training.step import Stepper

WARM_UP = 2  # rounds that are not measured: they compile kernels and allocate buffers
# How far the mean loss of a step may differ between two variants that must have the same loss.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(eq=False)
class Bench:
    """An engine, the steps to measure with it, and the variants to run on each step."""

    config: TrainConfig
    engine: Engine
    switch: VariantSwitch
    variants: list[Variant]
    steps: list[ProfiledStep]
    device: torch.device
    stepper: Stepper = field(init=False)

    def __post_init__(self) -> None:
        self.stepper = Stepper(self.config, self.engine, self.device)

    @property
    def measured(self) -> list[Variant]:
        return [variant for variant in self.variants if variant.skipped is None]

    def run(self, progress: Progress) -> tuple[dict[str, list[StageTimes]], dict[str, float]]:
        """Returns the times of every variant in every round, and its loss in the first round.

        Raises TrainingStopped if losses disagree or memory runs out.
        """
        clock = StageClock(self.device)
        times: dict[str, list[StageTimes]] = {variant.name: [] for variant in self.measured}
        first: dict[str, float] = {}
        with timed_stages(clock, self.engine):
            for index in range(-WARM_UP, self.config.profile):
                step = self.steps[index % len(self.steps)]
                losses: dict[str, float] = {}
                with _no_garbage_collection():
                    for variant in round_order(self.measured, index):
                        losses[variant.name], taken = self._timed_step(
                            variant, step, self.config.seed + index + WARM_UP, clock
                        )
                        if index >= 0:
                            times[variant.name].append(taken)
                self.check(losses)
                if index == 0:
                    first = losses
                if index >= 0:
                    progress.say(f"round {index + 1}/{self.config.profile}", "round")
        return times, first

    def _timed_step(
        self, variant: Variant, step: ProfiledStep, seed: int, clock: StageClock
    ) -> tuple[float, StageTimes]:
        self.switch.use(variant)
        clock.start()
        with memory_for(variant.name):
            loss = self.take(step, seed)
        times = clock.stop()
        wait = step.wait_s(times.seconds, self.config.reads_ahead)
        return loss, StageTimes(times.seconds + wait, {**times.stages, WAIT: wait})

    def take(self, step: ProfiledStep, seed: int) -> float:
        """Takes one optimiser step as in training, but at learning rate 0. Returns the mean loss over all ranks."""
        taken = self.stepper.take(step.batch, seed=seed, learning_rate=0.0)
        if taken.batch is not step.batch:  # oom_policy=skip dropped some of its pairs
            raise torch.OutOfMemoryError(quoted(taken.batch.bad))
        return means_of(summed_over_ranks(taken.sums, self.device))["loss"]

    def check(self, losses: Mapping[str, float]) -> None:
        """Raises TrainingStopped if variants that must have the same loss differ. Every rank sees the same losses."""
        allowed = TOLERANCES[self.engine.dtype]
        for loss_type in sorted({variant.loss_type for variant in self.measured}):
            same = {variant.name: losses[variant.name] for variant in self.measured if variant.loss_type == loss_type}
            expected = math.log(2) if loss_type == "dpo" and self._dpo_starts_at_log_2() else next(iter(same.values()))
            if not all(abs(loss - expected) <= allowed for loss in same.values()):
                found = ", ".join(f"{name} {loss:.6f}" for name, loss in same.items())
                raise TrainingStopped(
                    f"no times are shown: these losses should all be {expected:.6f} within {allowed}, found {found}"
                )

    def _dpo_starts_at_log_2(self) -> bool:
        """True if DPO's loss must be log 2: policy equals reference; default form, no extra term, no weights."""
        every = all(pair.preference for step in self.steps for pair in step.batch.pairs)
        form = self.config.variant if self.config.loss_type == "dpo" else None
        plain = self.engine.module.auxiliary is None and not self.config.use_weighting
        return every and plain and form in (None, "sigmoid")

    def costs(self, variant: Variant) -> dict[str, Any]:
        """A variant's memory (on the rank that needs most), FLOPs (all ranks) and precomputing time. All ranks must call this."""
        policies = [self.engine.module.policy, self.switch.references.copy]
        self.switch.use(variant)

        def take() -> float:
            return self.take(self.steps[0], self.config.seed)

        with memory_for(variant.name):
            peak = self._held_bytes(variant) + peak_of_step(take, self.device)
            with visible_products([policy for policy in policies if policy is not None]):
                take()
                flops = count_flops(take)
        ranks = every_rank((peak, flops))
        return {
            "peak_memory_bytes": max(rank[0] for rank in ranks),
            "flops": sum(rank[1] for rank in ranks),
            "amortised_s": self.switch.references.precompute_s[variant.shared]
            if variant.reference == "precomputed"
            else None,
        }

    def _held_bytes(self, variant: Variant) -> int:
        """Bytes allocated between steps. A frozen copy of the model counts only if the variant uses it."""
        copy = self.switch.references.copy_bytes
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - (0 if variant.reference == "frozen_copy" else copy)
        optimizer, module = self.engine.optimizer, self.engine.module
        tensors = [*module.parameters(), *module.buffers()]
        tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) + (copy if variant.reference == "frozen_copy" else 0)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keeps Python's garbage collector from adding a pause to one variant's time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
