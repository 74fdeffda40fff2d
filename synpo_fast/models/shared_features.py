"""Lets policies with the same frozen vision tower, such as a policy and its reference, encode each video only once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from synpo_fast.models.families.registry import VideoFeatures, VideoInputs
from synpo_fast.models.policy import FeatureStore, Policy


@contextmanager
def shared_video_features(policies: Sequence[Policy]) -> Iterator[None]:
    """Shares the features that one of `policies` encodes with the others, inside the context.

    A policy whose tower trains takes no part.
    """
    before = [policy.feature_store for policy in policies]
    try:
        kept = _SharedFeatures(before[0])
        for policy in policies:
            policy.feature_store = kept
        yield
    finally:
        for policy, store in zip(policies, before, strict=True):
            policy.feature_store = store


class _SharedFeatures:
    """A feature store for one step, keyed by the identity of the video object. `inner` is a store that outlives the step."""

    def __init__(self, inner: FeatureStore | None) -> None:
        self.inner = inner
        self.kept: dict[int, VideoFeatures] = {}

    def get(self, video: VideoInputs) -> VideoFeatures | None:
        found = self.kept.get(id(video))
        if found is None and self.inner is not None:
            found = self.inner.get(video)
            if found is not None:
                self.kept[id(video)] = found
        return found

    def put(self, video: VideoInputs, features: VideoFeatures) -> None:
        self.kept[id(video)] = features
        if self.inner is not None:
            self.inner.put(video, features)
