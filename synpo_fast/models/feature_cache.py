"""A disk cache for the features of a frozen vision tower, shared by epochs and runs, with the prompt tokens of each video.

A folder belongs to one tower: it holds the tower's key (a digest of weights and config), and opening it with another tower is
an error. A file is named by the video's key (data/video_key.py) or by a digest of the tower's input. So changed frames, sizes
or normalisation lead to another file name, and a stale feature cannot be returned.

Worker processes use StoredVideos, which finds features before their video is decoded. Nothing is ever deleted.
"""

import json
import logging
import os
import pickle
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from synpo_fast.errors import UserError
from synpo_fast.models.digest import video_key
from synpo_fast.models.families.registry import VideoFeatures, VideoInputs

FORMAT = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredVideos:
    """The videos of a cache folder, by key. Any number of processes may read and write the folder."""

    folder: Path

    def find(self, key: str) -> VideoInputs | None:
        """Returns the video with features and tokens but without pixels, or None. A damaged file gives a warning and None."""
        stored = _load(self.folder / f"{key}.pt")
        if stored is None:
            return None
        features = VideoFeatures(stored["features"], tuple(stored["deepstack"]))
        return VideoInputs(
            stored["tensors"],
            tuple(stored["token_ids"].tolist()),
            stored["placeholder_id"],
            stored["seconds_per_grid"],
            key=key,
            features=features,
        )


class FeatureCache:
    """A feature cache for policy.feature_store, which is used while the tower is frozen. `tower` is digest.tower_key(policy).

    hits and misses count the videos looked up, including those whose features a worker process had already found.
    """

    def __init__(self, folder: str | Path, *, tower: str) -> None:
        self.folder, self.tower = Path(folder), tower
        self.hits = self.misses = 0
        self._writes = True  # False after a failed write: a full disk does not end a run
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"feature_cache={str(folder)!r} cannot be used as a folder: {error.strerror}; name another"
            ) from error
        meta = self.folder / "tower.json"
        if not meta.exists():
            _write(meta, json.dumps({"format": FORMAT, "tower": tower}).encode())
        known = json.loads(meta.read_text())
        if known.get("format") != FORMAT:
            raise UserError(
                f"{self.folder} holds features in another version's format ({known.get('format')}, now {FORMAT}); give "
                "this run another folder, or delete this one"
            )
        if known != {"format": FORMAT, "tower": tower}:
            raise UserError(
                f"{self.folder} holds features of another vision tower ({known.get('tower', '?')[:12]}, "
                f"now {tower[:12]}); give this run another folder, or delete this one"
            )

    def get(self, video: VideoInputs) -> VideoFeatures | None:
        """Returns the video's stored features, or None."""
        features = video.features
        if features is None:
            stored = _load(self._file(video))
            features = None if stored is None else VideoFeatures(stored["features"], tuple(stored["deepstack"]))
        self.hits += features is not None
        self.misses += features is None
        return features

    def put(self, video: VideoInputs, features: VideoFeatures) -> None:
        """Stores a video's features. After a failed write, this process warns once and stores nothing more."""
        if not self._writes:
            return
        file = self._file(video)
        # Without a recipe the pixels are among the tensors, which are too large to store. Such a video is keyed by its content,
        # so it is never looked up before decoding, and its tensors are not needed.
        small = {} if video.recipe is None else video.tensors
        content = {
            "features": _on_the_host(features.features),
            "deepstack": [_on_the_host(tensor) for tensor in features.deepstack],
            "tensors": {name: tensor.cpu() for name, tensor in small.items()},
            "token_ids": torch.tensor(video.token_ids, dtype=torch.int32),
            "placeholder_id": video.placeholder_id,
            "seconds_per_grid": video.seconds_per_grid,
        }
        partial = _partial(file)
        try:
            torch.save(content, partial)
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            self._writes = False
            partial.unlink(missing_ok=True)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning(
                "feature_cache: %s cannot be written (%s); this process writes no more features", file, reason
            )

    def _file(self, video: VideoInputs) -> Path:
        return self.folder / f"{video_key(video)}.pt"


def _on_the_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor to the host. Without a copy, torch.save would write the whole storage that a slice is part of."""
    return tensor.detach().cpu().clone()


def _load(file: Path) -> dict[str, Any] | None:
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        logger.warning(
            "%s is damaged and will be recomputed: %s", file, str(error).splitlines()[0] if str(error) else error
        )
        return None


def _write(file: Path, content: bytes) -> None:
    partial = _partial(file)
    partial.write_bytes(content)
    partial.replace(file)


def _partial(file: Path) -> Path:
    """Returns a unique temporary name: processes on other machines may have the same id and write the same file."""
    return file.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
