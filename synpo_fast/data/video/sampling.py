"""Selects the frames of a video that a model sees.

The SynPO authors' rule, for a part of N frames that lasts d seconds:

    n = clamp(int(d * fps), min_frames, max_frames), never more than N          indices = int(linspace(0, N - 1, n))

Alternatively n is fixed. If the time between frames varies, frame numbers do not measure time. Then n times are spread evenly
from the first frame's time to the last one's, and each selects the frame shown at that time. At a constant rate exactly the
authors' rule is used, so that results cannot differ from it by rounding.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from synpo_fast.data.video.video_info import VideoError, VideoInfo

# Relative to the mean gap. Matroska rounds times to milliseconds, which is 6 % at 120 frames per second.
RATE_SLACK = 0.1


@dataclass(frozen=True)
class FrameSampling:
    """A rule that selects frames evenly: num_frames frames, or fps frames per second between two bounds.

    Args:
        num_frames: the number of frames; give either this or fps.
        fps: frames per second, but at least min_frames and at most max_frames frames.

    Never selects more frames than the part of the video has. Raises ValueError if both or neither are given, and for values out
    of range.
    """

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int = 1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(f"give either num_frames or fps, got {self.num_frames} and {self.fps}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be positive, got {self.num_frames}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be positive and finite, got {self.fps}")
        if self.num_frames is not None and (self.min_frames, self.max_frames) != (1, None):
            raise ValueError(
                "min_frames and max_frames limit the number that fps gives; with num_frames, leave them out"
            )
        if self.min_frames < 1 or (self.max_frames is not None and self.max_frames < self.min_frames):
            raise ValueError(f"need 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}")

    def count(self, duration: float, available: int) -> int:
        """The number of frames to take from `available` frames that last `duration` seconds."""
        if self.num_frames is not None:
            return min(self.num_frames, available)
        assert self.fps is not None
        # 1e-6 corrects rounding: 60 * 0.04 s at 5 frames per second is 12 frames.
        wanted = max(int(duration * self.fps + 1e-6), self.min_frames)
        return min(wanted, available if self.max_frames is None else self.max_frames, available)

    def indices(self, info: VideoInfo, start: float | None = None, end: float | None = None) -> list[int]:
        """Selected frame numbers, rising, of the part from start to end, in seconds; None is the video's start or end."""
        part = part_frames(info, start, end)
        return spread(info, part, self.count(part_seconds(info, start, end), len(part)))

    def clip_indices(self, parts: Sequence[tuple[VideoInfo, float | None, float | None]]) -> list[list[int]]:
        """Selected frames of each part (video, start, end), for parts shown one after another as one video.

        Their total number is that of one video with the total length. It is divided by duration, at least one frame each. Raises
        ValueError for more parts than frames.
        """
        if not parts:
            raise ValueError("there are no clips to sample")
        frames = [part_frames(*part) for part in parts]
        seconds = [part_seconds(*part) for part in parts]
        total = self.count(sum(seconds), sum(len(part) for part in frames))
        if total < len(parts):
            raise ValueError(f"{len(parts)} clips need one frame each, but only {total} are to be taken in all: {self}")
        shares = share_out(total, seconds, [len(part) for part in frames])
        return [spread(info, part, n) for (info, _, _), part, n in zip(parts, frames, shares, strict=True)]


def uniform(num_frames: int, n: int) -> list[int]:
    """n of num_frames frame numbers by the authors' rule. For n > 1 they include the first and the last."""
    if not 1 <= n <= num_frames:
        raise ValueError(f"cannot take {n} of {num_frames} frames")
    return [int(index) for index in np.linspace(0, num_frames - 1, n).astype(int)]


def part_frames(info: VideoInfo, start: float | None = None, end: float | None = None) -> range:
    """The frames that begin in [start, end); if none does, the frame shown at start. Raises VideoError past the end."""
    first, last = _bounds(info, start, end)
    begin, stop = bisect_left(info.timestamps, first - 1e-6), bisect_left(info.timestamps, last - 1e-6)
    return range(begin, stop) if begin < stop else range(max(0, begin - 1), max(1, begin))


def part_seconds(info: VideoInfo, start: float | None = None, end: float | None = None) -> float:
    first, last = _bounds(info, start, end)
    return last - first


def spread(info: VideoInfo, part: range, n: int) -> list[int]:
    """n frames of a part, evenly spread in time. For n > 1 they include its first and last frame."""
    chosen = [part.start + index for index in uniform(len(part), n)]
    times = info.timestamps[part.start : part.stop]
    if n < 3 or n == len(part) or constant_rate(times):
        return chosen
    moments = np.linspace(times[0], times[-1], n)
    shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
    return [part.start + index for index in _without_repeats(shown.tolist(), len(part))]


def constant_rate(times: Sequence[float]) -> bool:
    """True if the times are evenly spaced, up to RATE_SLACK times the mean gap."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    gap = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(np.asarray(times) - even).max() <= RATE_SLACK * gap)


def seconds_per_frame(info: VideoInfo, indices: Sequence[int]) -> float:
    """The mean time between two selected frames; for a single frame, the duration of the video."""
    if len(indices) < 2:
        return info.duration
    gaps = [info.timestamps[after] - info.timestamps[before] for before, after in pairwise(indices)]
    return sum(gaps) / len(gaps)


def share_out(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """Divides `total` by weight into shares of at least 1 and at most `room`. Each unit goes to the share that lacks most."""
    assert len(weights) <= total <= sum(room)
    shares = [1] * len(weights)
    for _ in range(total - len(weights)):
        not_full = [place for place in range(len(weights)) if shares[place] < room[place]]
        shares[max(not_full, key=lambda place: (weights[place] / (shares[place] + 0.5), -place))] += 1
    return shares


def _without_repeats(indices: list[int], available: int) -> list[int]:
    """The nearest rising numbers without repeats. A frame shown for long is taken once, and its neighbours fill the gap."""
    for place in range(1, len(indices)):
        indices[place] = max(indices[place], indices[place - 1] + 1)
    limit = available
    for place in reversed(range(len(indices))):
        limit = min(indices[place], limit - 1)
        indices[place] = limit
    return indices


def _bounds(info: VideoInfo, start: float | None, end: float | None) -> tuple[float, float]:
    first, last = 0.0 if start is None else start, info.duration if end is None else min(end, info.duration)
    if not 0 <= first < last:
        raise VideoError(info.path, f"has no part from {start} to {end} s: it lasts {info.duration:.3f} s")
    return first, last
