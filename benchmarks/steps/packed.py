"""Variants that run this package's policy: synpo_fast with its options, and DPO with the same options."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

from torch import Tensor

from benchmarks.steps.step_variant import DPO_BETA, Forward, Scores, use_attention
from benchmarks.steps.workload import Workload
from synpo_fast.losses import PairLogprobs, dpo, synpo
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


def synpo_step(workload: Workload, *, share_prefix: bool, pack: bool, cached: bool = False) -> Forward:
    store = _warm_cache(workload) if cached else None

    def loss(scores: Scores) -> Tensor:
        return synpo(_policy_logps(workload, store, share_prefix, pack, scores)).losses.mean()

    setting = f"policy(samples, share_prefix={share_prefix}, pack={pack}){', FeatureCache' if cached else ''}"
    return Forward(loss, f"{setting}; {workload.policy.attn_implementation}")


def dpo_step(workload: Workload, *, precomputed: bool = False) -> Forward:
    """DPO with everything this package has: shared prompts, packed rows, one tower pass per step, head on response rows only."""
    policy = workload.policy
    use_attention(workload, policy.attn_implementation)
    reference: Reference = AdapterOff(policy)
    if precomputed:
        with tempfile.TemporaryDirectory() as folder:
            file, key = Path(folder) / "reference.pt", weights_key(policy)
            precompute(reference, in_batches(workload.samples), file, weights_key=key)
            reference = Precomputed(file, weights_key=key)
    store = OncePerStep()

    def loss(scores: Scores) -> Tensor:
        store.clear()
        logps = _policy_logps(workload, store, True, True, scores)
        other = _pair_logprobs([[r.to(policy.device) for r in sample] for sample in reference(workload.samples)])
        policy.feature_store = None
        return dpo(logps, other, beta=DPO_BETA).losses.mean()

    setting = "references.Precomputed" if precomputed else "references.AdapterOff"
    return Forward(loss, f"policy(samples), {setting}; {policy.attn_implementation}")


def _policy_logps(
    workload: Workload, store: FeatureStore | None, share_prefix: bool, pack: bool, scores: Scores
) -> PairLogprobs:
    policy = workload.policy
    use_attention(workload, policy.attn_implementation)
    policy.feature_store = store
    logps = policy(workload.samples, share_prefix=share_prefix, pack=pack)
    scores.tokens = [sample[which].detach() for which in range(2) for sample in logps]
    return _pair_logprobs(logps)


def _pair_logprobs(logps: Logps) -> PairLogprobs:
    return PairLogprobs.from_pairs([(chosen, rejected) for chosen, rejected in logps])


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
