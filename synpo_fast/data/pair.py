"""One preference pair: a video, a prompt, a better and a worse response."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """video: a path, or frames already chosen as a uint8 tensor [T, H, W, 3]; None makes a text pair.

    ground_truth: a caption for the auxiliary NLL. loss: "preference", or "sft" for a row that trains on chosen alone.
    Raises ValueError, naming the pair, for an empty or equal response and for frames of another shape or type.
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

    def __post_init__(self) -> None:
        name = f"pair {self.id!r}"
        for field in ("prompt", "chosen", "rejected"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field).strip():
                raise ValueError(f"{name}: {field} is empty")
        if self.loss not in ("preference", "sft"):
            raise ValueError(f"{name}: loss must be 'preference' or 'sft', got {self.loss!r}")
        if self.loss == "preference" and self.chosen == self.rejected:
            raise ValueError(f"{name}: chosen and rejected are the same text, so there is nothing to prefer")
        video = self.video
        if isinstance(video, Tensor) and (
            video.dtype != torch.uint8 or video.dim() != 4 or video.shape[-1] != 3 or 0 in video.shape
        ):
            raise ValueError(f"{name}: frames must be uint8 [T, H, W, 3], got {video.dtype} {list(video.shape)}")
