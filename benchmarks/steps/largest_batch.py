"""The largest number of pairs a step can take before the GPU's memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.steps.presets import Preset
from benchmarks.steps.step_variant import StepVariant, full_step
from benchmarks.steps.workload import make_workload
from synpo_fast.models import Policy

MOST = 256


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest count in 1..most that fits, if fitting is monotone; 0 if not even 1 does. Doubling, then halving."""
    good, bad = 0, most + 1
    count = 1
    while count <= most:
        if not fits(count):
            bad = count
            break
        good, count = count, min(2 * count, most) if count < most else most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_batch(preset: Preset, policy: Policy, variant: StepVariant, device: torch.device, *, seed: int = 0) -> int:
    """Pairs of the preset in one step of the variant; every count is tried with freshly made tensors."""

    def step(pairs: int) -> None:
        workload = make_workload(replace(preset, pairs=pairs), device, seed=seed, policy=policy)
        full_step(workload, variant, variant.prepare(workload))()

    def fits(pairs: int) -> bool:
        try:
            step(pairs)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            policy.zero_grad(set_to_none=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    return largest(fits)
