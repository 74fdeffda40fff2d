"""Features of a frozen vision tower, kept on disk between epochs and runs.

A folder belongs to one tower: its key, a digest of weights and config, is written into it, and opening it with another
tower is an error. A file is named by the digest of the video as the tower gets it, so frames, sizes or normalisation that
changed are simply not found. A stale feature can not be returned.
"""

import json
import os
from pathlib import Path

import torch

from synpo_fast.errors import UserError
from synpo_fast.models.digest import video_key
from synpo_fast.models.family import VideoFeatures, VideoInputs

FORMAT = 1


class FeatureCache:
    """Set it as policy.feature_store; it is used while the tower is frozen. `tower` is digest.tower_key(policy)."""

    def __init__(self, folder: str | Path, *, tower: str) -> None:
        self.folder, self.tower = Path(folder), tower
        self.hits = self.misses = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        meta = self.folder / "tower.json"
        if not meta.exists():
            _write(meta, json.dumps({"format": FORMAT, "tower": tower}).encode())
        known = json.loads(meta.read_text())
        if known != {"format": FORMAT, "tower": tower}:
            raise UserError(
                f"{self.folder} holds features of another vision tower ({known.get('tower', '?')[:12]}, "
                f"now {tower[:12]}); give this run a folder of its own or delete that one"
            )

    def get(self, video: VideoInputs) -> VideoFeatures | None:
        file = self._file(video)
        if not file.exists():
            self.misses += 1
            return None
        self.hits += 1
        stored = torch.load(file, weights_only=True)
        return VideoFeatures(stored["features"], tuple(stored["deepstack"]))

    def put(self, video: VideoInputs, features: VideoFeatures) -> None:
        file = self._file(video)
        partial = file.with_suffix(f".{os.getpid()}.partial")  # other processes may write the same
        deepstack = [tensor.detach().cpu() for tensor in features.deepstack]
        torch.save({"features": features.features.detach().cpu(), "deepstack": deepstack}, partial)
        partial.replace(file)

    def _file(self, video: VideoInputs) -> Path:
        return self.folder / f"{video_key(video)}.pt"


def _write(file: Path, content: bytes) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")  # other processes may write the same
    partial.write_bytes(content)
    partial.replace(file)
