"""The FLOPs of a step, predicted from its number of passes, and the speed-up that they predict.

    language model   2 FLOPs per weight and token, `Passes.language` times
    vision tower     2 FLOPs per weight and patch, `Passes.vision` times for each video
    head             2 D V FLOPs per row, `Passes.head` times

A backward through a frozen layer costs one more forward (gradients to inputs). Attention's quadratic part and the adapter are
left out; the counted FLOPs in the table include them. A row's `limit` is the baseline's cost divided by the row's: the speed-up
if every FLOP took the same time and nothing else took any.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from benchmarks.steps.step_variant import Passes
from benchmarks.steps.workload import Workload
from synpo_fast.models import Sample


@dataclass(frozen=True)
class Unit:
    """FLOPs of one forward pass: of the language model per token, of the tower over the videos of all pairs, of the head per
    row. Videos are of equal size."""

    language: float
    vision: float
    head: float


def unit_costs(workload: Workload) -> Unit:
    policy = workload.policy
    language_model = policy.family.language_model(policy.base)
    vision = policy.family.vision_modules(policy.base)
    patches = sum(
        int(sample.video.tensors["video_grid_thw"].prod()) for sample in workload.samples if sample.video is not None
    )
    weights = sum(_matrix_weights(module) for module in vision) - sum(3 * _merger_weights(m) // 4 for m in vision)
    head = policy.base.get_output_embeddings().weight.numel()
    return Unit(2.0 * _matrix_weights(language_model), 2.0 * weights * patches, 2.0 * head)


def _matrix_weights(module: nn.Module) -> int:
    """The number of weights in linear layers and convolutions, without adapters. Embeddings multiply nothing."""
    return sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv3d) and "lora_" not in name
    )


def _merger_weights(tower: nn.Module) -> int:
    """The number of weights in the projector, which runs once for four patches."""
    merger = getattr(tower, "merger", None)
    return 0 if merger is None else _matrix_weights(merger)


def samples_of(workload: Workload, rows: str) -> list[Sample]:
    """The samples that a variant runs: one per prompt, or one per pair."""
    return [row.sample for row in workload.rows] if rows == "responses" else workload.samples


def tokens_of(workload: Workload, rows: str) -> int:
    """Tokens that the language model processes for all pairs, if they are laid out as `Passes.rows` says."""
    if rows == "padded":
        return workload.batch["input_ids"].numel()
    lengths = [(len(sample.prompt), [len(r) - 1 for r in sample.responses]) for sample in samples_of(workload, rows)]
    if rows == "apart":
        return sum(2 * prompt + sum(responses) for prompt, responses in lengths)
    return sum(prompt + sum(responses) for prompt, responses in lengths)


def expected_flops(workload: Workload, passes: Passes, unit: Unit) -> float:
    return (
        passes.language * tokens_of(workload, passes.rows) * unit.language
        + passes.vision * unit.vision * len(samples_of(workload, passes.rows)) / len(workload.samples)
        + head_flops(workload, passes, unit)
    )


def head_flops(workload: Workload, passes: Passes, unit: Unit) -> float:
    valid_only = passes.head_rows == "valid" or (passes.head_rows == "trl" and workload.device.type == "cuda")
    samples = samples_of(workload, passes.rows)
    valid = sum(len(response) for sample in samples for response in sample.responses)
    return passes.head * (valid if valid_only else workload.batch["input_ids"].numel()) * unit.head


def tokens_only_limit(ratio: float, *, share_prefix: bool) -> float:
    """The speed-up of SynPO over adapter-off DPO if only the language model's tokens cost time. ratio: prefix / completion."""
    return 3 * 2 * (ratio + 1) / (2 * (ratio + 2) if share_prefix else 4 * (ratio + 1))
