"""The variants of a training step that a profile compares, and the switch that sets one engine up for each of them.

    synpo                    the configured loss; synpo if the configured loss reads a reference
    dpo-adapter-off          DPO; its reference is the model without its adapter
    dpo-frozen-copy          DPO; its reference is a copy of the model
    dpo-precomputed          DPO; its reference log-probs are computed beforehand

Each of them has a second form, `-unshared`. The first form gives DPO every gain that is not specific to SynPO: prompts shared by
both responses, pairs packed into rows, the fused head on response tokens only, one pass of the vision tower for policy and
reference. `-unshared` runs the prompt once per response, and the reference calls the tower again. It keeps packed rows, because
DPO would look worse without them: single short rows take longer than the padded batch of a plain implementation. Under sdpa and
eager attention, where the cost of a row grows with the square of its length, packed rows are slower, so there each response of an
unshared variant is a row of its own.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from synpo_fast.config.options import LOSS_OPTIONS, REFERENCES
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.losses.weighted_sum import SFT, spec_of
from synpo_fast.models.attention import SEGMENTS, VARLEN
from synpo_fast.models.policy import Logps, Policy, Sample
from synpo_fast.references import AdapterOff, FrozenCopy, Precomputed, Reference, detached_logps, in_batches, precompute
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.pair_module import PairModule

KINDS = tuple(kind for kind in REFERENCES if kind != "auto")


@dataclass(frozen=True)
class Variant:
    """One variant of a step.

    reference: the kind of reference, or None. shared: True if the prompt runs once per pair and the tower once per video.
    skipped: the reason if it cannot be measured.
    """

    name: str
    loss_type: str
    reference: str | None
    shared: bool
    skipped: str | None = None


def variants_of(config: TrainConfig, *, copied: bool) -> list[Variant]:
    """All variants, each with the reason if it cannot be measured. copied: True if there is a frozen copy of the model."""
    own = config.loss_type
    if own != SFT and spec_of(own).needs_reference:
        own = "synpo"
    variants = []
    for shared in (True, False):
        suffix = "" if shared else "-unshared"
        variants.append(Variant(own + suffix, own, None, shared))
        variants += [Variant(f"dpo-{kind.replace('_', '-')}{suffix}", "dpo", kind, shared) for kind in KINDS]
    return [replace(variant, skipped=_why_impossible(variant, config, copied)) for variant in variants]


def _why_impossible(variant: Variant, config: TrainConfig, copied: bool) -> str | None:
    if variant.reference == "adapter_off" and not config.use_peft:
        return "use_peft=false: there is no adapter to switch off"
    if variant.reference == "frozen_copy" and config.zero_stage == 3:
        return "zero_stage=3: a copy would hold the whole model on every device"
    if variant.reference == "frozen_copy" and not copied:
        return "a copy of the model does not fit the device's memory"
    return None


@dataclass
class ReferenceSet:
    """The references by kind.

    copy: the frozen copy. precompute_s: seconds to compute the log-probs of one step beforehand, with shared prompts (True) and
    without (False).
    """

    by_kind: dict[str, Any]
    copy: Policy | None
    precompute_s: dict[bool, float]

    @property
    def copy_bytes(self) -> int:
        if self.copy is None:
            return 0
        return sum(tensor.untyped_storage().nbytes() for tensor in [*self.copy.parameters(), *self.copy.buffers()])


def make_references(config: TrainConfig, policy: Policy, steps: Sequence[Sequence[Sample]]) -> ReferenceSet:
    """Makes all references, before the engine shards or wraps the model. steps: the samples of each step to be measured."""
    policy.eval()
    by_kind: dict[str, Any] = {}
    copied = None if config.zero_stage == 3 else _copy_that_fits(policy)
    if copied is not None:
        # The copy runs without its adapter, which is zero, so that the variant does not pay for it.
        by_kind["frozen_copy"] = AdapterOff(copied.policy) if config.use_peft else copied
    if config.use_peft:
        by_kind["adapter_off"] = AdapterOff(policy)
    detached_logps(policy, steps[0][:1], config.share_prefix)  # warm-up, since the first call of an operator is slow
    seconds, store = {}, policy.feature_store
    every = [sample for step in steps for sample in step]
    for shared in (False, True):  # both compute the same log-probs; only their times differ
        policy.feature_store = store if shared else None
        policy.row_tokens = _row_tokens(config, policy, shared)
        begin = time.perf_counter()
        with memory_for("dpo-precomputed" + "-unshared" * (not shared)):
            by_kind["precomputed"] = _precomputed(config, policy, every, share_prefix=shared and config.share_prefix)
        seconds[shared] = (time.perf_counter() - begin) / len(steps)
    policy.row_tokens = config.row_tokens
    policy.train()
    return ReferenceSet(by_kind, None if copied is None else copied.policy, seconds)


def _row_tokens(config: TrainConfig, policy: Policy, shared: bool) -> int | None:
    """The row length for a variant. 1 gives each response its own row; ZeRO-3 forbids that, as ranks need equally many rows."""
    quadratic = policy.attn_implementation not in (SEGMENTS, VARLEN)
    return 1 if quadratic and not shared and config.zero_stage != 3 else config.row_tokens


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turns running out of memory into TrainingStopped with the name of the variant, `what`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingStopped(
            f"{what} ran out of memory, so nothing was compared: lower per_device_train_batch_size or max_batch_tokens"
        ) from error


def _copy_that_fits(policy: Policy) -> FrozenCopy | None:
    """A frozen copy of the model, or None on all ranks if it does not fit on one of the devices."""
    found: FrozenCopy | None = None
    try:
        found = FrozenCopy(policy)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
    fits: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fits, found is not None)
    return found if all(fits) else None


class _OnDevice:
    """A reference whose log-probs are moved to the policy's device."""

    def __init__(self, inner: Reference, device: torch.device) -> None:
        self.inner, self.device, self.same_tower = inner, device, inner.same_tower

    def __call__(self, samples: Sequence[Sample]) -> Logps:
        return [[values.to(self.device, non_blocking=True) for values in sample] for sample in self.inner(samples)]


def _precomputed(config: TrainConfig, policy: Policy, every: Sequence[Sample], *, share_prefix: bool) -> Reference:
    def score(samples: Sequence[Sample]) -> Logps:
        return detached_logps(policy, samples, share_prefix)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reference.pt"
        batches = in_batches(every, config.per_device_train_batch_size)
        precompute(score, batches, file, weights_key="profile")
        return _OnDevice(Precomputed(file, weights_key="profile"), policy.device)


class VariantSwitch:
    """Sets a module up for the step of a variant."""

    def __init__(self, config: TrainConfig, module: PairModule, references: ReferenceSet) -> None:
        self.config, self.module, self.references = config, module, references
        self.store = module.policy.feature_store  # the configured store, which unshared variants do not use

    def use(self, variant: Variant) -> None:
        assert variant.skipped is None, variant
        module, share = self.module, variant.shared and self.config.share_prefix
        module.loss_type, module.options, module.share_prefix = (
            variant.loss_type,
            self._options(variant.loss_type),
            share,
        )
        module.reference = None if variant.reference is None else self.references.by_kind[variant.reference]
        if module.reference is not None and variant.reference != "precomputed":
            module.reference.share_prefix = share
        module.encodes_once = variant.shared
        for policy in (module.policy, self.references.copy):
            if policy is not None:
                policy.feature_store = self.store if variant.shared else None
                policy.row_tokens = _row_tokens(self.config, policy, variant.shared)

    def _options(self, loss_type: str) -> dict[str, Any]:
        """The configured options for the configured loss, the default options for any other."""
        if loss_type == self.config.loss_type:
            return self.config.applied_loss_options
        reference = "precomputed" if loss_type != SFT and spec_of(loss_type).needs_reference else "auto"
        unset: dict[str, Any] = dict.fromkeys(LOSS_OPTIONS)
        return replace(self.config, loss_type=loss_type, reference=reference, **unset).applied_loss_options
