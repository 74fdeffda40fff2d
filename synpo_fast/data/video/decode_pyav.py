"""Decodes frames on the CPU with PyAV, whose wheel contains FFmpeg: only the needed parts, and only wanted frames to RGB.

Decoding a frame needs the packets from the keyframe before it. So wanted frames are grouped into runs, each from a keyframe to
the last wanted packet. The decoder is then drained, which returns frames held back for reordering without decoding what
follows. Between runs the decoder seeks, or skips packets if the distance is short. Pictures that no other picture refers to are
decoded only if wanted (H.264, HEVC). Frames are identified by their presentation time, so a seek to a wrong place cannot give a
wrong frame. Frames that the runs did not return are decoded from the start of the file.

synpo_fast.data.video.rgb converts each frame to RGB straight into the output.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synpo_fast.data.video.container import check_deadline, codec_name, open_video
from synpo_fast.data.video.orientation import upright
from synpo_fast.data.video.rgb import RgbWriter
from synpo_fast.data.video.video_info import VideoError, VideoInfo

REORDER = 16  # pictures that may come before a keyframe in the file and after it on the screen, or the reverse
SEEK_GAP = 32  # frames; over a shorter distance packets are read and skipped, which costs less than a seek
SKIPS_UNREFERRED = ("h264", "hevc")

log = logging.getLogger(__name__)


def decode(
    path: Path,
    info: VideoInfo,
    indices: Sequence[int],
    *,
    device: torch.device,
    deadline: float,
    opened: tuple[Any, Any] | None = None,
) -> Tensor:
    """Decodes the frames at indices, on the CPU whatever the device. The contract is in synpo_fast/data/video/decode.py.

    opened: the file's open container and stream, at any position. This avoids opening the file again, for which FFmpeg decodes
    its first frames.
    """
    frames = _Frames(path, info, indices)
    if info.by_order:
        _decode_by_order(frames, deadline)
    elif opened is None or not frames.begins_after_a_keyframe():
        with open_video(path, deadline) as (container, stream):
            _decode_by_time(frames, container, stream, deadline, at=0)
    else:
        opened[1].codec_context.flush_buffers()
        _decode_by_time(frames, *opened, deadline, at=None)
    if frames.missing and not info.by_order:
        _decode_from_start(frames, deadline)
    frames.check_complete()
    return frames.out


class _Frames:
    """The output tensor. Each wanted frame is converted once, when it arrives, and written to all of its positions."""

    def __init__(self, path: Path, info: VideoInfo, indices: Sequence[int]) -> None:
        self.path, self.info = path, info
        self.places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            self.places.setdefault(index, []).append(place)
        self.missing = set(self.places)
        # NumPy requests huge pages, torch does not.
        self.pixels = np.empty((len(indices), info.height, info.width, 3), np.uint8)
        self.out = torch.from_numpy(self.pixels)
        self.rgb = RgbWriter()
        self.stored = (info.width, info.height) if info.rotation % 180 == 0 else (info.height, info.width)

    def put(self, index: int, frame: Any) -> None:
        if (frame.width, frame.height) != self.stored:
            width, height = self.stored
            raise VideoError(self.path, f"frame {index} is {frame.width}x{frame.height}, the first is {width}x{height}")
        if frame.is_corrupt:
            raise VideoError(self.path, f"frame {index} is damaged")
        first, *others = self.places[index]
        if not (self.info.rotation or self.info.mirrored):
            self.rgb.write(frame, self.pixels[first])
        else:
            as_stored = np.empty((frame.height, frame.width, 3), np.uint8)
            self.rgb.write(frame, as_stored)
            self.pixels[first] = upright(as_stored, self.info.rotation, self.info.mirrored)
        for place in others:
            self.pixels[place] = self.pixels[first]
        self.missing.discard(index)

    def begins_after_a_keyframe(self) -> bool:
        """True if a keyframe precedes the first wanted frame. It does not, for example, if an edit list hides the keyframe."""
        return bool(self.info.keyframes) and self.info.keyframes[0] <= min(self.missing)

    def check_complete(self) -> None:
        if self.missing:
            raise VideoError(
                self.path,
                f"{len(self.missing)} of {len(self.places)} frames cannot be decoded, the first of them {min(self.missing)}",
            )


@dataclass(frozen=True)
class Run:
    """Wanted frames that are decoded without a seek. start: index of the keyframe to begin at; None is the start of the file."""

    start: int | None
    wanted: tuple[int, ...]


def plan_runs(wanted: Sequence[int], keyframes: Sequence[int], *, every_frame_is_key: bool = False) -> list[Run]:
    """Splits the wanted frames, in rising order, into runs, so that frames before a later keyframe need not be decoded.

    A run continues over a keyframe at most REORDER frames after its last wanted frame: the packet of that keyframe may already
    have been read. If every frame is a keyframe, a run skips unwanted packets anyway. It then ends only where a seek is cheaper.
    """
    runs: list[Run] = []
    for index in wanted:
        at = bisect_right(keyframes, index) - 1
        start = keyframes[at] if at >= 0 else None
        if runs:
            last = runs[-1].wanted[-1]
            joined = start is None or start <= last + (SEEK_GAP if every_frame_is_key else REORDER)
            if joined:
                runs[-1] = Run(runs[-1].start, (*runs[-1].wanted, index))
                continue
        runs.append(Run(start, (index,)))
    return runs


def _decode_by_time(frames: _Frames, container: Any, stream: Any, deadline: float, at: int | None) -> None:
    """Decodes the runs.

    at: the frame at which the container stands. None: any position; the first wanted frame must then have a keyframe before it.
    """
    from av.error import FFmpegError

    intra = stream.codec_context.codec.intra_only
    skip = codec_name(stream) in SKIPS_UNREFERRED
    problem = "a seek missed frames"
    try:
        for run in plan_runs(sorted(frames.missing), frames.info.keyframes, every_frame_is_key=intra):
            if run.start is not None and (at is None or run.start > at + SEEK_GAP):
                container.seek(_pts(frames.info, run.start), stream=stream)
            if not _decode_run(frames, run, _pictures(frames, container, stream, run, deadline, intra, skip)):
                problem = f"decoding cannot begin at frame {run.start}"
                break
            at = run.wanted[-1]
    except FFmpegError as error:
        problem = f"{error.strerror} after a seek"
    if frames.missing:
        log.warning("%s: %s; decoding %d frames from the start of the file", frames.path, problem, len(frames.missing))


def _decode_from_start(frames: _Frames, deadline: float) -> None:
    """Decodes the missing frames from the start of the file, without relying on keyframes."""
    run = Run(None, tuple(sorted(frames.missing)))
    with open_video(frames.path, deadline) as (container, stream):
        _decode_run(frames, run, _pictures(frames, container, stream, run, deadline, False, False))


def _decode_run(frames: _Frames, run: Run, pictures: Iterator[Any]) -> bool:
    """Keeps the wanted pictures of a run. False if the keyframe itself is not decoded.

    Such a keyframe begins a picture that builds up over several frames (H.264 with intra refresh). The frames after it are not
    reliable either.
    """
    wanted = {_pts(frames.info, index): index for index in run.wanted}
    start = None if run.start is None else _pts(frames.info, run.start)
    for picture in pictures:
        if start is not None and picture.pts is not None and picture.pts >= start:
            if picture.pts > start:
                return False
            start = None
        index = wanted.get(picture.pts)
        if index is not None and index in frames.missing:
            frames.put(index, picture)
    return True


def _pictures(
    frames: _Frames, container: Any, stream: Any, run: Run, deadline: float, only_wanted: bool, skip_unreferred: bool
) -> Iterator[Any]:
    """Yields pictures from the run's keyframe to its last wanted packet, then drains and resets the decoder."""
    info, context = frames.info, stream.codec_context
    unsent = {_pts(info, index) for index in run.wanted}
    start = None if run.start is None else _pts(info, run.start)
    skipping = ""  # the current skip_frame; setting that takes as long as demuxing
    for packet in container.demux(stream):
        check_deadline(frames.path, deadline, f"frame {run.wanted[0]} was looked for")
        if start is not None and packet.pts != start:
            if packet.is_keyframe and packet.pts is not None and packet.pts > start:
                return  # the seek landed after the keyframe
            continue
        start = None
        is_wanted = packet.pts in unsent
        if packet.size == 0 or (only_wanted and not is_wanted):
            continue
        if skip_unreferred and skipping != (wish := "DEFAULT" if is_wanted else "NONREF"):
            context.skip_frame = skipping = wish
        yield from context.decode(packet)
        unsent.discard(packet.pts)
        if not unsent:
            break
    yield from context.decode(None)
    context.flush_buffers()


def _decode_by_order(frames: _Frames, deadline: float) -> None:
    with open_video(frames.path, deadline) as (container, stream):
        for index, frame in enumerate(container.decode(stream)):
            check_deadline(frames.path, deadline, f"frame {index} was decoded")
            if index in frames.missing:
                frames.put(index, frame)
                if not frames.missing:
                    return


def _pts(info: VideoInfo, index: int) -> int:
    return info.first_pts + round(info.timestamps[index] * info.time_base.denominator / info.time_base.numerator)
