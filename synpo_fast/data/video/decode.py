"""Decodes frames of a video: selects the frames, chooses a backend, and checks what the backend returns.

A backend is a function
    decode(path: Path, info: VideoInfo, indices: Sequence[int], *, device: torch.device, deadline: float) -> Tensor
that returns the frames at `indices` (valid ones, any order, repeats allowed) as uint8 [T, H, W, 3], upright, in the size
that info states, on `device` or on the CPU. It raises VideoError if it cannot decode them, or if time.monotonic() passes
deadline. The result is checked here again: missing frames are an error and are never replaced by repeats.
"""

import importlib
import logging
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import util
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synpo_fast.data.video.video_info import CHOOSE_AUTO, BackendRefusal, VideoError, VideoInfo
from synpo_fast.data.video.video_path import resolve_video
from synpo_fast.errors import MissingPackage, UserError

Decoder = Callable[..., Tensor]

# name -> (the module with `decode`, the package it needs, how to install that)
BACKENDS: dict[str, tuple[str, str, str]] = {
    "pyav": ("synpo_fast.data.video.decode_pyav", "av", "pip install 'av>=18'"),
    "dali": ("synpo_fast.data.video.decode_dali", "nvidia.dali", "pip install nvidia-dali-cuda130"),
    "torchcodec": (
        "synpo_fast.data.video.decode_torchcodec",
        "torchcodec",
        "pip install torchcodec, and FFmpeg on the system",
    ),
    "images": ("synpo_fast.data.video.decode_images", "av", "pip install 'av>=18'"),
}
NVDEC_CODECS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9", "mpeg4": "MPEG-4"}  # no AV1 on Hopper
# An estimate, not measured. Below this share PyAV is chosen, which seeks; DALI 2.4 decodes from the first frame on.
GPU_SHARE = 0.25
WHOLE_VIDEO_BYTES = 2**30
DEADLINE_S = 30.0
TIME_SLACK = 1e-6  # seconds: a time computed as 3 * 0.04 means the frame at 0.12

log = logging.getLogger(__name__)


def decode_frames(
    path: str | Path,
    *,
    indices: Sequence[int] | None = None,
    times: Sequence[float] | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    root: str | Path | None = None,
    deadline_s: float = DEADLINE_S,
    info: VideoInfo | None = None,
) -> tuple[Tensor, VideoInfo]:
    """Decodes frames: returns uint8 [T, H, W, 3], upright, and the video's VideoInfo. Its indices say which frames they are.

    Args:
        path: a video file, or a folder of images.
        indices: frame numbers, any order, repeats allowed.
        times: instead of indices, seconds from the first frame. Each selects the frame shown at that time; the last frame is
            shown until the end of its duration. With neither indices nor times, all frames are decoded, up to 1 GiB.
        backend: "auto", "pyav", "dali", "torchcodec" or "images".
        device: where the frames are returned; None is the CPU.
        root: the folder that path is relative to; the path may not leave it.
        deadline_s: seconds after which a video that is still being read raises VideoError.
        info: the result of probe_video, if known; the video is then not probed again. open_video_file also avoids opening it
            twice.

    Raises VideoError, a ValueError naming the file, for a video that cannot be used or lacks a requested frame; ValueError for
    wrong arguments; ImportError for a backend that is not installed.
    """
    if indices is not None and times is not None:
        raise ValueError("give indices or times, not both")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    if info is not None:
        video = OpenedVideo(resolve_video(path, root), info, time.monotonic() + deadline_s)
        return video.frames(indices, times=times, backend=backend, device=device)
    with open_video_file(path, root=root, deadline_s=deadline_s) as video:
        return video.frames(indices, times=times, backend=backend, device=device)


@contextmanager
def open_video_file(
    path: str | Path, *, root: str | Path | None = None, deadline_s: float = DEADLINE_S
) -> Iterator["OpenedVideo"]:
    """Opens and probes a video, which can then be decoded. deadline_s: for everything in the context. Raises VideoError."""
    deadline = time.monotonic() + deadline_s
    file = resolve_video(path, root)
    if file.is_dir():
        from synpo_fast.data.video.decode_images import probe_images

        yield OpenedVideo(file, probe_images(file), deadline)
        return
    require_backend("pyav")
    from synpo_fast.data.video.container import open_video
    from synpo_fast.data.video.probe import probe_container

    with open_video(file, deadline) as opened:
        video = OpenedVideo(file, probe_container(file, *opened, deadline), deadline, opened)
        try:
            yield video
        finally:
            video.container = None


@dataclass
class OpenedVideo:
    """A probed video whose frames can be decoded.

    deadline: a time.monotonic(). container: PyAV's container and stream while the file is open. If None, decoding opens the
    file again.
    """

    file: Path
    info: VideoInfo
    deadline: float
    container: tuple[Any, Any] | None = None

    def frames(
        self,
        indices: Sequence[int] | None = None,
        *,
        times: Sequence[float] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, VideoInfo]:
        """Decodes frames of this video. Arguments and errors are those of decode_frames."""
        info = self.info
        wanted = _wanted_frames(info, indices, times)
        target = torch.device("cpu") if device is None else torch.device(device)
        may_choose = backend == "auto"
        if may_choose:
            share = len(set(wanted)) / info.num_frames
            backend, reason = choose_backend(info.codec, target.type, share, available_backends())
            log.info("%s: %s, %s", self.file.name, backend, reason)
        if (backend == "images") != (info.codec == "images"):
            raise ValueError(
                f"backend {backend!r} cannot read {info.path}, whose frames are {info.codec}; choose {CHOOSE_AUTO}"
            )
        try:
            frames = self._decode(backend, wanted, target)
        except BackendRefusal as error:
            if not may_choose:
                raise
            log.info("%s: falling back to pyav: %s", self.file.name, error.reason)
            backend = "pyav"
            frames = self._decode(backend, wanted, target)
        shape = (len(wanted), info.height, info.width, 3)
        if tuple(frames.shape) != shape or frames.dtype != torch.uint8:
            reason = f"{backend} returned {frames.dtype} {list(frames.shape)}, expected uint8 {list(shape)}"
            raise VideoError(self.file, reason)
        return frames.to(target), replace(info, backend=backend, indices=tuple(wanted))

    def _decode(self, backend: str, wanted: list[int], device: torch.device) -> Tensor:
        decoder = _load(backend)
        if not wanted:
            return torch.empty((0, self.info.height, self.info.width, 3), dtype=torch.uint8)
        more = {"opened": self.container} if backend == "pyav" else {}
        return decoder(self.file, self.info, wanted, device=device, deadline=self.deadline, **more)


def probe_video(path: str | Path, *, root: str | Path | None = None, deadline_s: float = DEADLINE_S) -> VideoInfo:
    """Reads a video's number of frames, their times and the keyframes from its packets; decodes only as much as that needs.

    Raises VideoError for a video that cannot be used.
    """
    with open_video_file(path, root=root, deadline_s=deadline_s) as video:
        return video.info


def choose_backend(codec: str, device_type: str, share_wanted: float, available: Sequence[str]) -> tuple[str, str]:
    """Chooses the backend for a video; returns (backend, reason). A pure function of its arguments.

    share_wanted: distinct wanted frames divided by all frames. available: the backends whose packages are installed.
    """
    if codec == "images":
        return "images", "a folder of images"
    name = NVDEC_CODECS.get(codec, codec)
    if device_type == "cpu":
        return "pyav", f"{name} on a CPU"
    if "dali" not in available:
        return "pyav", f"{name}, and DALI is not installed"
    if codec not in NVDEC_CODECS:
        return "pyav", f"{name} has no hardware decoder"
    if share_wanted < GPU_SHARE:
        return "pyav", f"{name}, {share_wanted:.1%} of its frames wanted"
    return "dali", f"{name}, {share_wanted:.1%} of its frames wanted, on a GPU"


def available_backends() -> list[str]:
    """The backends whose packages are installed. Does not import them."""
    return [name for name, (_, package, _) in BACKENDS.items() if _installed(package)]


def frames_at(info: VideoInfo, times: Sequence[float]) -> list[int]:
    """The index of the frame shown at each time; the first frame for earlier times. Raises VideoError beyond the end."""
    late = [at for at in times if not isfinite(at) or at > info.duration + TIME_SLACK]
    if late:
        raise VideoError(info.path, f"has no frame at {late[0]} s: it lasts {info.duration:.3f} s")
    return [max(0, bisect_right(info.timestamps, at + TIME_SLACK) - 1) for at in times]


def _wanted_frames(info: VideoInfo, indices: Sequence[int] | None, times: Sequence[float] | None) -> list[int]:
    if times is not None:
        return frames_at(info, times)
    if indices is None:
        size = info.num_frames * info.height * info.width * 3
        if size > WHOLE_VIDEO_BYTES:
            raise ValueError(
                f"{info.path}: all {info.num_frames} frames of {info.width}x{info.height} would take {size / 2**30:.1f} GiB, "
                f"more than {WHOLE_VIDEO_BYTES / 2**30:g}; select frames with indices or times"
            )
        return list(range(info.num_frames))
    wanted = [int(index) for index in indices]
    if wanted and min(wanted) < 0:
        raise ValueError(f"frame indices must not be negative, got {min(wanted)}")
    if wanted and max(wanted) >= info.num_frames:
        raise VideoError(info.path, f"has no frame {max(wanted)}: it has {info.num_frames} frames")
    return wanted


def _load(backend: str) -> Decoder:
    require_backend(backend)
    decoder: Decoder = importlib.import_module(BACKENDS[backend][0]).decode
    return decoder


def require_backend(backend: str) -> None:
    """Raises UserError for a backend that does not exist, MissingPackage for one that is not installed."""
    if backend not in BACKENDS:
        raise UserError(f"video_backend must be auto or one of {', '.join(BACKENDS)}, got {backend!r}")
    _, package, hint = BACKENDS[backend]
    if not _installed(package):
        raise MissingPackage(f"the {backend} backend needs {package}: {hint}")


def _installed(package: str) -> bool:
    parent = package.split(".")[0]
    return util.find_spec(parent) is not None and util.find_spec(package) is not None
