"""Variants that run this package's policy: synpo_fast with its options, and DPO with the same options."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

from torch import Tensor

from benchmarks.steps.step_variant import DPO_BETA, Forward, Scores, use_attention
from benchmarks.steps.workload import Workload
from synpo_fast.losses import PairLogprobs, dpo, synpo
from synpo_fast.models import Sample
from synpo_fast.models.digest import tower_key, weights_key
from synpo_fast.models.families.base import VideoFeatures, VideoInputs
from synpo_fast.models.feature_cache import FeatureCache
from synpo_fast.models.policy import FeatureStore, Logps
from synpo_fast.references import AdapterOff, Precomputed, Reference, in_batches, precompute


class OncePerStep:
    """Keeps a step's features from the policy's forward for the reference's forward. Call clear() between steps."""

    def __init__(self) -> None:
        self.kept: dict[int, VideoFeatures] = {}

    def get(self, video: VideoInputs) -> VideoFeatures | None:
        return self.kept.get(id(video))

    def put(self, video: VideoInputs, features: VideoFeatures) -> None:
        self.kept[id(video)] = features

    def clear(self) -> None:
        self.kept.clear()


def synpo_step(
    workload: Workload, *, share_prefix: bool, pack: bool, cached: bool = False, rows: bool = False
) -> Forward:
    """SynPO on the workload's pairs. rows: each prompt is one sample with all its responses, not one sample per pair."""
    store = _warm_cache(workload) if cached else None

    def loss(scores: Scores) -> Tensor:
        return synpo(_policy_logps(workload, store, share_prefix, pack, scores, rows)).losses.mean()

    setting = f"policy({'rows' if rows else 'samples'}, share_prefix={share_prefix}, pack={pack})"
    return Forward(loss, f"{setting}{', FeatureCache' if cached else ''}; {workload.policy.attn_implementation}")


def dpo_step(workload: Workload, *, precomputed: bool = False, rows: bool = False) -> Forward:
    """DPO with everything this package has: shared prompts, packed rows, one tower pass per step, head on response rows only."""
    policy = workload.policy
    use_attention(workload, policy.attn_implementation)
    reference: Reference = AdapterOff(policy)
    if precomputed:
        with tempfile.TemporaryDirectory() as folder:
            file, key = Path(folder) / "reference.pt", weights_key(policy)
            precompute(reference, in_batches(_samples(workload, rows)), file, weights_key=key)
            reference = Precomputed(file, weights_key=key)
    store = OncePerStep()

    def loss(scores: Scores) -> Tensor:
        store.clear()
        logps = _policy_logps(workload, store, True, True, scores, rows)
        found = [[r.to(policy.device) for r in sample] for sample in reference(_samples(workload, rows))]
        other = _pair_logprobs(workload, found, rows)
        policy.feature_store = None
        return dpo(logps, other, beta=DPO_BETA).losses.mean()

    setting = "references.Precomputed" if precomputed else "references.AdapterOff"
    return Forward(loss, f"policy({'rows' if rows else 'samples'}), {setting}; {policy.attn_implementation}")


def _policy_logps(
    workload: Workload, store: FeatureStore | None, share_prefix: bool, pack: bool, scores: Scores, rows: bool
) -> PairLogprobs:
    policy = workload.policy
    use_attention(workload, policy.attn_implementation)
    policy.feature_store = store
    logps = policy(_samples(workload, rows), share_prefix=share_prefix, pack=pack)
    pairs = _pairs(workload, logps, rows)
    scores.tokens = [pair[which].detach() for which in range(2) for pair in pairs]
    return PairLogprobs.from_pairs(pairs)


def _samples(workload: Workload, rows: bool) -> list[Sample]:
    return [row.sample for row in workload.rows] if rows else workload.samples


def _pairs(workload: Workload, logps: Logps, rows: bool) -> list[tuple[Tensor, Tensor]]:
    """The log-probs of chosen and rejected of every pair."""
    if not rows:
        return [(chosen, rejected) for chosen, rejected in logps]
    each = zip(workload.rows, logps, strict=True)
    return [(found[better], found[worse]) for row, found in each for better, worse in row.comparisons]


def _pair_logprobs(workload: Workload, logps: Logps, rows: bool) -> PairLogprobs:
    return PairLogprobs.from_pairs(_pairs(workload, logps, rows))


def _warm_cache(workload: Workload) -> FeatureCache:
    """A feature cache on disk with the features of all videos, as after an earlier epoch."""
    folder = tempfile.mkdtemp(prefix="throughput-features-")
    cache = FeatureCache(folder, tower=tower_key(workload.policy))
    weakref.finalize(cache, _remove, folder)
    workload.policy.feature_store = cache
    workload.policy.encode_videos(workload.samples)
    workload.policy.feature_store = None
    return cache


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
