"""Encoded pairs: the tokens and pixels of a Pair, as the loader passes them to the training loop.

Tokens and pixels depend on the model family, and this layer knows no model. The caller therefore passes the encoder and the
store of features as arguments (scoring.PairEncoder, models.feature_cache.StoredVideos). This layer does not look into what
they return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from synpo_fast.data.pair import Pair


class PairTooLong(ValueError):
    """Raised for a pair that has more tokens than the encoder allows."""


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """One pair as tokens and pixels.

    sample: a models.policy.Sample. Its responses are chosen, then rejected if `preference`, then the ground truth if
    `has_ground_truth`.
    """

    sample: Any
    id: str
    preference: bool
    has_ground_truth: bool

    @property
    def num_bytes(self) -> int:
        """The bytes of the video's tensors. The tokens are not counted: they are negligible in comparison."""
        return 0 if self.sample.video is None else self.sample.video.num_bytes


class Encoder(Protocol):
    """Turns a pair and its frames into an EncodedPair. scoring.PairEncoder is the implementation in use."""

    def __call__(self, pair: Pair, frames: Tensor | None, seconds_per_frame: float | None = None) -> EncodedPair:
        """Encodes the pair. frames: uint8 [T, H, W, 3], None for a text pair. Raises PairTooLong or another ValueError."""
        ...

    def video_inputs(self, pair: Pair, frames: Tensor, seconds_per_frame: float | None) -> Any:
        """The video in the form that the model takes: a dataclass with a field `key`."""
        ...

    def with_video(self, pair: Pair, video: Any) -> EncodedPair:
        """Encodes the pair with a video that video_inputs or a store of features returned."""
        ...

    def video_facts(self) -> str:
        """A digest of everything except the frames that determines a video's pixels and tokens."""
        ...


# Maps a video's key (video_key.py) to its stored features, in the form that Encoder.with_video takes, or to None.
FindStored = Callable[[str], Any]
