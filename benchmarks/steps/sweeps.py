"""Sweeps of throughput.py: the comparison along prefix / completion, frames, or the share of response tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.steps import BASELINE
from benchmarks.steps.presets import Preset
from benchmarks.steps.workload import MARKERS, visual_tokens

# Smaller frames than in the table, so that a video fits into the shortest prefix.
SIZE = {"cpu": 84, "cuda": 224}
VIDEO_SHARE = 0.8  # of the prefix
TEXT = 30


@dataclass(frozen=True)
class Sweep:
    """An axis: its values, and `at`, which sets a preset to one of them."""

    label: str
    values: tuple[float, ...]
    at: Callable[[Preset, float], Preset]
    variants: tuple[str, ...]


def at_ratio(preset: Preset, ratio: float) -> Preset:
    return _with_video(replace(preset, prefix=round(preset.completion * ratio)))


def at_frames(preset: Preset, frames: float) -> Preset:
    preset = replace(preset, frames=int(frames))
    return replace(preset, prefix=visual_tokens(preset) + MARKERS + TEXT)


def at_valid(preset: Preset, share: float) -> Preset:
    length = preset.prefix + preset.completion
    completion = max(2, round(share * length))
    return _with_video(replace(preset, completion=completion, prefix=length - completion))


def _with_video(preset: Preset) -> Preset:
    if preset.family == "text":
        return preset
    a_step = visual_tokens(replace(preset, frames=2))
    return replace(preset, frames=2 * max(1, int(VIDEO_SHARE * preset.prefix / a_step)))


_MAIN = (BASELINE, "synpo-fast-unshared", "synpo-fast")
SWEEPS = {
    "ratio": Sweep("prompt tokens / response tokens", (0.5, 1, 2, 4, 8, 16), at_ratio, _MAIN),
    "frames": Sweep("frames", (8, 16, 32, 64, 128, 256), at_frames, _MAIN),
    "valid": Sweep(
        "share of response tokens in a row", (0.05, 0.1, 0.2, 0.4, 0.6, 0.8), at_valid,
        (BASELINE, "synpo-fused-head", "synpo-valid-rows", "synpo-fast"),
    ),
}  # fmt: skip


def presets_along(sweep: Sweep, preset: Preset, device: str) -> Iterator[tuple[float, Preset]]:
    """Yields each value with its preset. Raises ValueError for a sweep over frames of a model without video."""
    if preset.family == "text" and sweep.at is at_frames:
        raise ValueError(f"preset {preset.name!r} has no frames to sweep over")
    for value in sweep.values:
        yield value, sweep.at(replace(preset, size=SIZE[device]), value)
