"""Finds the largest number of pairs per step that fits in the GPU's memory."""

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
    """The largest count in 1..most that fits; 0 if not even 1 does. Doubles, then bisects, so `fits` must be monotone."""
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
    """The most pairs of the preset that fit in one step of the variant. Every count is tried with newly made tensors."""

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
