"""Keys that tell a pair's video from every other without decoding it: which file it is, and what is made of it.

The file by its name under the video root (its whole name without one), its size and the time it was last changed; the part of
it that is shown; then everything that decides pixels and tokens: which frames are taken, what decodes them, how they are
resized and normalised, the family and the tokenizer. A video that was replaced has another key. So have the same
bytes under another name, which costs a decoding and nothing else.

Frames that a pair brings itself are known by their bytes.
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

FORMAT = 1  # raise it when the same file and settings come to give other pixels or other tokens


def reading_facts(encoder: Encoder, sampling: FrameSampling, backend: str, device: torch.device) -> str:
    """A digest of what is made of a file, whichever it is. Reads the whole vocabulary: call it once."""
    return _digest(
        FORMAT,
        repr(sampling),
        [backend, available_backends() if backend == "auto" else []],
        [device.type, native_library.why_unavailable() is None],
        encoder.video_facts(),
    )


def video_key(pair: Pair, facts: str, root: str | Path | None) -> str | None:
    """None for a text pair. Raises VideoError for a file that is not there."""
    if isinstance(pair.video, Tensor):
        frames = pair.video.contiguous().cpu()
        bytes_of_frames = hashlib.sha256(frames.view(-1).numpy().data).hexdigest()
        return _digest(facts, list(frames.shape), bytes_of_frames)
    clips = pair.clips if pair.video is None else (Clip(str(pair.video)),)
    if not clips:
        return None
    return _digest(facts, [[clip.start, clip.end, *_identity(clip.path, root)] for clip in clips])


def _identity(path: str, root: str | Path | None) -> list[Any]:
    """The file's name and [name, size, time of change] of it, or of each image of a folder."""
    file = resolve_video(path, root)
    name = file if root is None else file.relative_to(Path(root).resolve())
    files = image_files(file) if file.is_dir() else [file]
    stats = [(each.name, os.stat(each)) for each in files]
    return [str(name), *([image, stat.st_size, stat.st_mtime_ns] for image, stat in stats)]


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
