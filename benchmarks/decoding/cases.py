"""The clips of decode.py, the frames wanted from them, and the contestants."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.contest import Step, Unavailable
from synpo_fast.testing import clips

FPS = 25
CONTAINERS = {"h264": ".mp4", "hevc": ".mp4", "vp9": ".webm", "mjpeg": ".avi", "av1": ".mp4"}
BASELINE = "baseline"
# The codecs that DALI decodes, by device. NVDEC decodes AV1 on Ada and Blackwell, not on Hopper.
DALI_CODECS = {"cpu": ("vp9", "mjpeg"), "cuda": ("vp9", "mjpeg", "h264", "hevc", "av1")}


@dataclass(frozen=True)
class Clip:
    """A generated video."""

    codec: str
    width: int
    height: int
    seconds: int
    keyframe_every: int  # frames

    @property
    def num_frames(self) -> int:
        return self.seconds * FPS

    @property
    def name(self) -> str:
        return f"{self.codec}-{self.width}x{self.height}-{self.seconds}s-key{self.keyframe_every}"

    def file(self, folder: Path) -> Path:
        """The path of the clip in `folder`. Writes it if it is not there; the name changes with the source of clips.py."""
        source = hashlib.sha256(Path(clips.__file__).read_bytes()).hexdigest()[:8]
        path = folder / f"{self.name}-{source}{CONTAINERS[self.codec]}"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / f"{os.getpid()}-{path.name}"
            clips.write_clip(
                unfinished,
                codec=self.codec,
                num_frames=self.num_frames,
                width=self.width,
                height=self.height,
                fps=FPS,
                keyframe_every=self.keyframe_every,
                b_frames=2,
            )
            unfinished.replace(path)
        return path


@dataclass(frozen=True)
class Case:
    """A clip and the frames wanted: "8" or another number of evenly spaced ones, "half" (every second frame) or "all"."""

    clip: Clip
    wanted: str

    @property
    def indices(self) -> list[int]:
        total = self.clip.num_frames
        if self.wanted in ("half", "all"):
            return list(range(0, total, 2 if self.wanted == "half" else 1))
        return np.linspace(0, total - 1, int(self.wanted)).astype(int).tolist()


def cases_of(*clips_and_wanted: tuple[Clip, str]) -> tuple[Case, ...]:
    return tuple(Case(clip, wanted) for clip, several in clips_and_wanted for wanted in several.split())


DEFAULT_CASES = cases_of(
    (Clip("h264", 640, 360, 120, 50), "8 32 half"),
    (Clip("h264", 640, 360, 20, 25), "8 all"),
    (Clip("h264", 640, 360, 20, 250), "8 all"),
    (Clip("h264", 640, 360, 20, 500), "8"),  # one group of pictures
    (Clip("h264", 426, 240, 5, 50), "8 all"),
    (Clip("h264", 1920, 1080, 8, 50), "8 all"),
    (Clip("hevc", 640, 360, 20, 50), "8 all"),
    (Clip("hevc", 1920, 1080, 5, 50), "8"),
    (Clip("vp9", 640, 360, 20, 50), "8 half"),
    (Clip("vp9", 1280, 720, 8, 50), "8"),
    (Clip("mjpeg", 640, 360, 20, 1), "8 half"),
    (Clip("av1", 640, 360, 20, 50), "8 all"),
)
QUICK_CASES = cases_of(
    (Clip("h264", 320, 240, 20, 50), "8 all"),
    (Clip("hevc", 320, 240, 5, 25), "8"),
    (Clip("vp9", 320, 240, 5, 25), "8 all"),
    (Clip("mjpeg", 320, 240, 5, 1), "8"),
    (Clip("av1", 320, 240, 5, 25), "8"),
)


def decode_all_then_pick(path: Path, indices: Sequence[int], device: torch.device) -> Tensor:
    """The baseline: PyAV decodes every frame, converts every frame to RGB, holds them all and picks the wanted ones."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [f.reformat(format="rgb24", threads=1).to_ndarray() for f in container.decode(stream)]
    return torch.from_numpy(np.stack([frames[index] for index in indices])).to(device)


def torchcodec_alone(path: Path, indices: Sequence[int], device: torch.device) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device=device)
    return decoder.get_frames_at(list(indices)).data


def ours(path: Path, indices: Sequence[int], device: torch.device, *, backend: str) -> Tensor:
    from synpo_fast.data.video.decode import decode_frames
    from synpo_fast.data.video.video_info import VideoError

    try:
        return decode_frames(path, indices=indices, backend=backend, device=device, deadline_s=600.0)[0]
    except VideoError as error:
        if "not supported on this GPU" in error.reason:
            raise Unavailable(error.reason) from error
        raise


Contestant = Callable[[Path, Sequence[int], torch.device], Tensor]
CONTESTANTS: dict[str, tuple[Contestant, str]] = {
    BASELINE: (decode_all_then_pick, "PyAV: decode all, convert all, pick; 1 thread"),
    "torchcodec-alone": (torchcodec_alone, "VideoDecoder(seek_mode='exact').get_frames_at; 1 thread"),
    "pyav": (partial(ours, backend="pyav"), "decode_frames(backend='pyav')"),
    "dali": (partial(ours, backend="dali"), "decode_frames(backend='dali')"),
    "torchcodec": (partial(ours, backend="torchcodec"), "decode_frames(backend='torchcodec')"),
}
OURS = ("pyav", "dali", "torchcodec")


def prepare(name: str, case: Case, path: Path, device: torch.device) -> Step:
    """The timed step: from the file's path to frames [T, H, W, 3] on the device. Raises Unavailable with the reason."""
    check_available(name, case.clip.codec, device)
    contestant, setting = CONTESTANTS[name]
    run: Any = partial(contestant, path, case.indices, device)
    return Step(run, setting)


def check_available(name: str, codec: str, device: torch.device) -> None:
    package = name.removesuffix("-alone")
    if package == "torchcodec" and util.find_spec("torchcodec") is None:
        raise Unavailable("torchcodec is not installed")
    if package == "dali":
        if util.find_spec("nvidia") is None or util.find_spec("nvidia.dali") is None:
            raise Unavailable("NVIDIA DALI is not installed")
        if codec not in DALI_CODECS[device.type]:
            raise Unavailable(f"DALI has no {codec} decoder on {device.type}")


def why_wrong(frames: Tensor, case: Case) -> str | None:
    """Says which frame does not carry the requested number; None if all do."""
    shape = (len(case.indices), case.clip.height, case.clip.width, 3)
    if tuple(frames.shape) != shape or frames.dtype != torch.uint8:
        return f"{frames.dtype} {list(frames.shape)} instead of uint8 {list(shape)}"
    for place, (frame, index) in enumerate(zip(frames.cpu().numpy(), case.indices, strict=True)):
        try:
            found = clips.read_barcode(frame)
        except ValueError as error:
            return f"frame {place}: {error}"
        if found != index:
            return f"frame {place} is number {found}, wanted {index}"
    return None
