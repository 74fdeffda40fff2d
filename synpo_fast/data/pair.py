"""One row of a manifest: a video, a prompt, and a better and a worse response, or several responses with scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.errors import UserError

LABELS = {True: "desirable", False: "undesirable"}  # the loss of a row with one response, by its label
SCORE_SLACK = 1e-9  # scores are sums of decimals such as 1.1: a difference below this is a rounding error


@dataclass(frozen=True)
class Response:
    """One of several responses to a prompt, with a judge's score: the higher, the better."""

    text: str
    score: float


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
    """A better and a worse response to one prompt, mostly about one video; or more responses, of which some are compared.

    Args:
        chosen, rejected: the better and the worse response. With `responses` leave them out: they become its best and worst,
            and chosen_score and rejected_score become their scores.
        video: a path, or frames already chosen as a uint8 tensor [T, H, W, 3]; None makes a text pair. A numpy array of that
            shape and type becomes a tensor, which shares the array's memory if possible.
        id: the name of the pair in messages.
        chosen_score, rejected_score: a judge's scores, used to drop pairs whose scores are too close.
        ground_truth: a caption for the auxiliary NLL.
        loss: "preference", or "sft" for a row that trains on chosen alone; its rejected may be empty. "desirable" and
            "undesirable" are rows of one labelled response, which is chosen or rejected; the other one is empty.
        clips: used instead of video: parts of one or several files, shown one after another as one video.
        responses: two or more scored responses, instead of chosen and rejected.
        comparisons: (better, worse), each an index of `responses`. Left out: every two responses whose scores differ.
        mismatched: a response that belongs to another row (mismatched.py). It is not written to a manifest.

    Raises ValueError, naming the pair, for an empty response, equal responses, frames of another shape or type, for both a
    video and clips, and for both responses and chosen or rejected.
    """

    prompt: str
    chosen: str = ""
    rejected: str = ""
    video: str | Path | Tensor | None = None
    id: str = ""
    chosen_score: float | None = None
    rejected_score: float | None = None
    ground_truth: str | None = None
    loss: str = "preference"
    clips: tuple[Clip, ...] = ()
    responses: tuple[Response, ...] = ()
    comparisons: tuple[tuple[int, int], ...] = ()
    mismatched: str | None = None

    def __post_init__(self) -> None:
        name = f"pair {self.id!r}"
        if self.responses or self.comparisons:
            self._take_responses(name)
        known = ("preference", "sft", *LABELS.values())
        if self.loss not in known:
            *most, last = map(repr, known)
            raise ValueError(f"{name}: loss must be {', '.join(most)} or {last}, got {self.loss!r}")
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

    def _take_responses(self, name: str) -> None:
        """Checks the responses and their comparisons, and fills in what follows from them."""
        if self.loss != "preference":
            what = "chosen alone" if self.loss == "sft" else "one response"
            raise ValueError(f"{name}: a row with loss {self.loss!r} trains on {what}; leave out its responses")
        _check_responses(self.responses, name)
        ordered = by_score(self.responses)
        best, worst = ordered[0], ordered[-1]
        filled = {"chosen": best.text, "rejected": worst.text}
        filled_scores = {"chosen_score": best.score, "rejected_score": worst.score}
        for field, value in {**filled, **filled_scores}.items():
            if getattr(self, field) not in ("", None, value):
                raise ValueError(f"{name}: give responses, or chosen and rejected with their scores, not both")
            object.__setattr__(self, field, value)
        every = [
            (better, worse)
            for better, worse in permutations(range(len(self.responses)), 2)
            if self.responses[better].score - self.responses[worse].score > SCORE_SLACK
        ]
        if not set(self.comparisons) <= set(every):
            raise ValueError(
                f"{name}: comparisons must be (better, worse) indices of responses with a higher and a lower score, got "
                f"{self.comparisons!r:.80} for {len(self.responses)} responses"
            )
        object.__setattr__(self, "comparisons", tuple(self.comparisons) or tuple(every))


def by_score(responses: Sequence[Response]) -> list[Response]:
    """The responses from the best to the worst. The order does not depend on the given one: equal scores are sorted by text."""
    return sorted(responses, key=lambda response: (-response.score, response.text))


def _check_responses(responses: Sequence[Response], name: str) -> None:
    if len(responses) < 2:
        raise ValueError(f"{name}: responses must have at least two entries, got {len(responses)}")
    first_use: dict[str, int] = {}
    for index, response in enumerate(responses):
        if not isinstance(response.text, str) or not response.text.strip():
            raise ValueError(f"{name}: responses[{index}] is empty")
        if response.text in first_use:
            raise ValueError(f"{name}: responses[{first_use[response.text]}] and responses[{index}] are the same text")
        first_use[response.text] = index
        if isinstance(response.score, bool) or not isinstance(response.score, (int, float)):
            raise ValueError(f"{name}: the score of responses[{index}] must be a number, got {response.score!r:.60}")
        if not math.isfinite(response.score):
            raise ValueError(f"{name}: the score of responses[{index}] must be finite, got {response.score}")


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
