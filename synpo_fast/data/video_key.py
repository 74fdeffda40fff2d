"""Computes a key that identifies a pair's video without decoding it, from the file and from the processing.

The key covers the file's path under the video root (or its full path without a root), its size and modification time, and the
part of it that is shown. It also covers everything that determines pixels and tokens: which frames are taken, what decodes
them, how they are resized and normalised, the model family and the tokenizer. A file that was replaced gets another key. A copy
under another name gets another key too, and is only decoded once more.

Frames that a pair holds in memory are identified by their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data.encoded import Encoder
from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.video.decode import available_backends
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video.video_path import image_files, resolve_video
from synpo_fast.ops import native_library

FORMAT = 1  # increase it when a change in the code gives other pixels or tokens for the same file and settings


def reading_facts(encoder: Encoder, sampling: FrameSampling, backend: str, device: torch.device) -> str:
    """A digest of the processing, the same for every file. Reads the whole vocabulary, so call it once."""
    return _digest(
        FORMAT,
        repr(sampling),
        [backend, available_backends() if backend == "auto" else []],
        [device.type, native_library.reason_unavailable() is None],
        encoder.video_facts(),
    )


def video_key(pair: Pair, facts: str, root: str | Path | None) -> str | None:
    """The key of the pair's video; None for a text pair. Raises VideoError for a missing file."""
    if isinstance(pair.video, Tensor):
        frames = pair.video.contiguous().cpu()
        bytes_of_frames = hashlib.sha256(frames.view(-1).numpy().data).hexdigest()
        return _digest(facts, list(frames.shape), bytes_of_frames)
    clips = pair.clips if pair.video is None else (Clip(str(pair.video)),)
    if not clips:
        return None
    return _digest(facts, [[clip.start, clip.end, *_identity(clip.path, root)] for clip in clips])


def _identity(path: str, root: str | Path | None) -> list[Any]:
    """The file's path, then [name, size, modification time] of the file or of each image in the folder."""
    file = resolve_video(path, root)
    name = file if root is None else file.relative_to(Path(root).resolve())
    files = image_files(file) if file.is_dir() else [file]
    stats = [(each.name, os.stat(each)) for each in files]
    return [str(name), *([image, stat.st_size, stat.st_mtime_ns] for image, stat in stats)]


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
