"""Encoded pairs: the tokens and pixels of a Pair, and which of its responses the loss compares.

The loader passes them to the training loop.

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
    """One row of a manifest as tokens and pixels. Every response runs once, however many comparisons use it.

    sample: a models.policy.Sample with all responses of the row. The numbers below are indices of its responses.
    comparisons: (better, worse) responses. The loss sees each comparison as one pair. Empty for a row with labels, and for a row
        that trains on one response alone ("sft").
    labels: (response, desirable) for a loss that reads each response by itself (kto), or only better ones (sft). The loss sees
        each as a row of its own.
    target: the response that a row without comparisons and labels trains on.
    ground_truth: the response that is the ground truth, None without one.
    mismatched: the response that belongs to another row, for the reference point of kto; None without one.
    """

    sample: Any
    id: str
    comparisons: tuple[tuple[int, int], ...] = ((0, 1),)
    target: int = 0
    ground_truth: int | None = None
    labels: tuple[tuple[int, bool], ...] = ()
    mismatched: int | None = None

    @property
    def preference(self) -> bool:
        """True if the row compares or labels responses, False if it trains on one alone."""
        return bool(self.comparisons or self.labels)

    @property
    def has_ground_truth(self) -> bool:
        return self.ground_truth is not None

    @property
    def pairs(self) -> tuple[tuple[int | None, int | None], ...]:
        """The pairs that the loss sees, each as the responses (better, worse). A label gives a pair with one response, and so
        does a row that trains on one response."""
        labelled = tuple((index, None) if desirable else (None, index) for index, desirable in self.labels)
        return self.comparisons or labelled or ((self.target, None),)

    @property
    def num_pairs(self) -> int:
        """The number of pairs that the loss sees: a row with several comparisons or labels counts as several pairs."""
        return len(self.pairs)

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
