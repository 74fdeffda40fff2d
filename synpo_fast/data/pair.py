"""One preference pair: a video, a prompt, a better and a worse response."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.errors import UserError

LABELS = {True: "desirable", False: "undesirable"}  # the loss of a row with one response, by its label


@dataclass(frozen=True)
class Clip:
    """A part of a video file, in seconds. start=None means the beginning of the file, end=None its end."""

    path: str
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        start, end = self.start or 0.0, math.inf if self.end is None else self.end
        if not (0 <= start < end) or math.isinf(start):
            raise ValueError(f"clip {self.path!r}: need 0 <= start < end, got start={self.start} and end={self.end}")


@dataclass(frozen=True, eq=False)
class Pair:
    """A better and a worse response to one prompt, mostly about one video.

    Args:
        video: a path, or frames already chosen as a uint8 tensor [T, H, W, 3]; None makes a text pair. A numpy array of that
            shape and type becomes a tensor, which shares the array's memory if possible.
        id: the name of the pair in messages.
        chosen_score, rejected_score: a judge's scores, used to drop pairs whose scores are too close.
        ground_truth: a caption for the auxiliary NLL.
        loss: "preference", or "sft" for a row that trains on chosen alone; its rejected may be empty. "desirable" and
            "undesirable" are rows of one labelled response, which is chosen or rejected; the other one is empty.
        clips: used instead of video: parts of one or several files, shown one after another as one video.
        mismatched: a response that belongs to another row (mismatched.py). It is not written to a manifest.

    Raises ValueError, naming the pair, for an empty response, equal responses, frames of another shape or type, and for both
    a video and clips.
    """

    prompt: str
    chosen: str
    rejected: str
    video: str | Path | Tensor | None = None
    id: str = ""
    chosen_score: float | None = None
    rejected_score: float | None = None
    ground_truth: str | None = None
    loss: str = "preference"
    clips: tuple[Clip, ...] = ()
    mismatched: str | None = None

    def __post_init__(self) -> None:
        name = f"pair {self.id!r}"
        known = ("preference", "sft", *LABELS.values())
        if self.loss not in known:
            raise ValueError(f"{name}: loss must be {' or '.join(map(repr, known))}, got {self.loss!r}")
        unused = {"sft": "rejected", "desirable": "rejected", "undesirable": "chosen"}.get(self.loss)
        if self.has_label and unused and getattr(self, unused):
            raise ValueError(f"{name}: a row with loss {self.loss!r} has one response, so {unused} must be empty")
        for field in ("prompt", "chosen", "rejected"):
            if field == unused:
                continue
            if not isinstance(getattr(self, field), str) or not getattr(self, field).strip():
                raise ValueError(f"{name}: {field} is empty")
        if self.clips and self.video is not None:
            raise ValueError(f"{name}: give video or clips, not both")
        if self.loss == "preference" and self.chosen == self.rejected:
            raise ValueError(f"{name}: chosen and rejected are the same text, so there is nothing to prefer")
        object.__setattr__(self, "video", _checked_video(self.video, name))

    @property
    def has_label(self) -> bool:
        """True for a row of one response with a label."""
        return self.loss in LABELS.values()


def _checked_video(video: Any, name: str) -> str | Path | Tensor | None:
    """Checks the video and returns it, with frames as a tensor. An error message never prints an array's values."""
    if video is None or isinstance(video, (str, Path)):
        return video
    if not isinstance(video, (Tensor, np.ndarray)):
        raise UserError(f"{name}: video must be a path, or frames as uint8 [T, H, W, 3], got {type(video).__name__}")
    dtype, shape = str(video.dtype).removeprefix("torch."), list(video.shape)
    if dtype != "uint8" or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UserError(f"{name}: frames must be uint8 [T, H, W, 3], got {dtype} {shape}")
    # A tensor has no negative strides and is always writable. An array that differs in this is copied.
    return video if isinstance(video, Tensor) else torch.from_numpy(np.require(video, requirements=("C", "W")))
