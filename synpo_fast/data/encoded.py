"""Encoded pairs: the tokens and pixels of a Pair, as the code that reads pairs hands them on.

Tokens and pixels belong to a model family, and this layer knows none. So the encoder and the stored features come from above
as arguments (scoring.PairEncoder, models.feature_cache.StoredVideos), and what they return is passed on unopened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from synpo_fast.data.pair import Pair


class TooLong(ValueError):
    """A pair with more tokens than the encoder's bound."""


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """sample: models.policy.Sample. Its responses: chosen, then rejected if `preference`, then the ground truth if
    `has_ground_truth`."""

    sample: Any
    id: str
    preference: bool
    has_ground_truth: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of its video's tensors, beside which the tokens are nothing."""
        return 0 if self.sample.video is None else self.sample.video.num_bytes


class Encoder(Protocol):
    """Turns a pair and its frames into an EncodedPair. See scoring.PairEncoder, which is the one in use."""

    def __call__(self, pair: Pair, frames: Tensor | None, seconds_per_frame: float | None = None) -> EncodedPair:
        """frames: uint8 [T, H, W, 3], None for a text pair. Raises TooLong or another ValueError for a pair it cannot encode."""
        ...

    def video_inputs(self, pair: Pair, frames: Tensor, seconds_per_frame: float | None) -> Any:
        """The video as the model takes it, a dataclass with a field `key`."""
        ...

    def with_video(self, pair: Pair, video: Any) -> EncodedPair:
        """The pair with a video that video_inputs returned, or a store of features found."""
        ...

    def video_facts(self) -> str:
        """A digest of what decides, beside the frames, a video's pixels and tokens."""
        ...


# A video's key (video_key.py) -> its stored features, in the form that Encoder.with_video takes, or None.
FindStored = Callable[[str], Any]
