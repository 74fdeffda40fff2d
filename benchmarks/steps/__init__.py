"""The variants of a training step that throughput.py compares, by name, in the order of its table."""

from __future__ import annotations

from functools import partial

from benchmarks.steps import packed, padded, trl_trainers
from benchmarks.steps.step_variant import Passes, StepVariant

BASELINE = "trl-dpo-adapter-off"  # speed-ups compare with it by default
# The variants in the picture of the gains. Each adds one change to the one before it.
GAINS = (
    BASELINE, "synpo-no-reference", "synpo-fused-head", "synpo-valid-rows", "synpo-vision-once", "synpo-prefix-shared",
    "synpo-fast", "synpo-fast-cached",
)  # fmt: skip

_every_variant = (
    StepVariant(BASELINE, "dpo", Passes("padded", 3, 4, 4, "trl"), trl_trainers.dpo_adapter_off, title="TRL's DPO, adapter off"),
    StepVariant("trl-dpo-valid-rows", "dpo", Passes("padded", 3, 4, 4, "valid"), trl_trainers.dpo_valid_rows),
    StepVariant("trl-dpo-frozen-copy", "dpo", Passes("padded", 3, 4, 4, "trl"), trl_trainers.dpo_frozen_copy),
    StepVariant("trl-dpo-precomputed", "dpo", Passes("padded", 2, 2, 3, "trl"), trl_trainers.dpo_precomputed),
    StepVariant("liger-dpo", "dpo", Passes("padded", 3, 4, 3, "all"), padded.liger_dpo),
    StepVariant("trl-simpo", "simpo", Passes("padded", 2, 2, 2, "all"), trl_trainers.simpo),
    StepVariant("synpo-released", "synpo", Passes("padded", 2, 2, 2, "all"), padded.released),
    StepVariant(
        "synpo-no-reference", "synpo", Passes("padded", 2, 2, 3, "trl"), padded.no_reference, title="no reference model"
    ),
    StepVariant(
        "synpo-fused-head", "synpo", Passes("padded", 2, 2, 2, "all"), padded.fused_head_all_rows,
        ours=True, title="our fused head",
    ),
    StepVariant(
        "synpo-valid-rows", "synpo", Passes("padded", 2, 2, 2, "valid"), padded.fused_head_valid_rows,
        ours=True, title="head on response tokens only",
    ),
    StepVariant(
        "synpo-vision-once", "synpo", Passes("apart", 2, 1, 2, "valid"),
        partial(packed.synpo_step, share_prefix=False, pack=False), ours=True, title="video encoded once, no padding",
    ),
    StepVariant(
        "synpo-prefix-shared", "synpo", Passes("shared", 2, 1, 2, "valid"),
        partial(packed.synpo_step, share_prefix=True, pack=False), ours=True, title="prompt run once per pair",
    ),
    StepVariant(
        "synpo-fast", "synpo", Passes("shared", 2, 1, 2, "valid"),
        partial(packed.synpo_step, share_prefix=True, pack=True), ours=True, title="pairs packed: synpo-fast",
    ),
    StepVariant(
        "synpo-fast-cached", "synpo", Passes("shared", 2, 0, 2, "valid"),
        partial(packed.synpo_step, share_prefix=True, pack=True, cached=True), ours=True,
        title="features of an earlier epoch",
    ),
    StepVariant(
        "synpo-fast-unshared", "synpo", Passes("apart", 2, 1, 2, "valid"),
        partial(packed.synpo_step, share_prefix=False, pack=True), ours=True,
    ),
    StepVariant("synpo-fast-dpo", "dpo", Passes("shared", 3, 1, 3, "valid"), packed.dpo_step, ours=True),
    StepVariant(
        "synpo-fast-dpo-precomputed", "dpo", Passes("shared", 2, 1, 2, "valid"),
        partial(packed.dpo_step, precomputed=True), ours=True,
    ),
    StepVariant(
        "synpo-fast-responses", "synpo", Passes("responses", 2, 1, 2, "valid"),
        partial(packed.synpo_step, share_prefix=True, pack=True, rows=True), ours=True,
    ),
    StepVariant(
        "synpo-fast-responses-dpo", "dpo", Passes("responses", 3, 1, 3, "valid"), partial(packed.dpo_step, rows=True), ours=True,
    ),
)  # fmt: skip
# The variants of the table unless others are named: for prompts with two responses, and with more.
_RESPONSES = ("synpo-fast-responses", "synpo-fast-responses-dpo")
OF_SEVERAL_RESPONSES = (BASELINE, "synpo-fast-dpo", "synpo-fast", "synpo-fast-responses-dpo", "synpo-fast-responses")
OF_PAIRS = tuple(variant.name for variant in _every_variant if variant.name not in _RESPONSES)
VARIANTS: dict[str, StepVariant] = {variant.name: variant for variant in _every_variant}
