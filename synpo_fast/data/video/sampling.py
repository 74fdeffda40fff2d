"""Which frames of a video a model is shown.

Of a part of N frames that lasts d seconds, with the SynPO authors' rule (SYSTEMS.md, 1):

    n = clamp(int(d * fps), min_frames, max_frames), never more than N          indices = int(linspace(0, N - 1, n))

or a fixed n. Where the time between frames varies, frame numbers are no measure of time: n moments are spread evenly from
the first frame's to the last one's, and each takes the frame shown then. At a constant rate the authors' rule is used as it
stands, so the two can not differ by a rounding.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from synpo_fast.data.video.video_info import VideoError, VideoInfo

RATE_SLACK = 0.1  # of the mean gap: Matroska rounds times to milliseconds, 6 % at 120 frames a second


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are taken, spread evenly: num_frames of them, or fps a second between two bounds.

    Args:
        num_frames: so many; give this or fps.
        fps: so many a second, but at least min_frames and at most max_frames.

    Never more than the part of the video holds. Raises ValueError for settings that say both, neither or nonsense.
    """

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int = 1
    max_frames: int | None = None

    def __post_init__(self) -> None:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError(f"give num_frames or fps, one of them; got {self.num_frames} and {self.fps}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames must be positive, got {self.num_frames}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"fps must be positive and finite, got {self.fps}")
        if self.num_frames is not None and (self.min_frames, self.max_frames) != (1, None):
            raise ValueError(
                "min_frames and max_frames bound a number that follows from fps; num_frames is that number"
            )
        if self.min_frames < 1 or (self.max_frames is not None and self.max_frames < self.min_frames):
            raise ValueError(f"need 1 <= min_frames <= max_frames, got {self.min_frames} and {self.max_frames}")

    def count(self, duration: float, available: int) -> int:
        """How many frames are taken of `available` ones that last `duration` seconds."""
        if self.num_frames is not None:
            return min(self.num_frames, available)
        assert self.fps is not None
        wanted = max(int(duration * self.fps + 1e-6), self.min_frames)  # 60 * 0.04 s at 5 a second are 12
        return min(wanted, available if self.max_frames is None else self.max_frames, available)

    def indices(self, info: VideoInfo, start: float | None = None, end: float | None = None) -> list[int]:
        """Frame numbers, rising, of the part shown from start to end, in seconds; None is the video's own."""
        part = part_frames(info, start, end)
        return spread(info, part, self.count(part_seconds(info, start, end), len(part)))

    def clip_indices(self, parts: Sequence[tuple[VideoInfo, float | None, float | None]]) -> list[list[int]]:
        """For parts (video, start, end) shown one after another as one video: the frames of each.

        Their number is that of one video as long as all of them; it is shared out by duration, at least one each. ValueError
        where there are more parts than frames.
        """
        if not parts:
            raise ValueError("there are no clips to sample")
        frames = [part_frames(*part) for part in parts]
        seconds = [part_seconds(*part) for part in parts]
        total = self.count(sum(seconds), sum(len(part) for part in frames))
        if total < len(parts):
            raise ValueError(f"{len(parts)} clips need a frame each, but {total} are to be taken in all: {self}")
        shares = share_out(total, seconds, [len(part) for part in frames])
        return [spread(info, part, n) for (info, _, _), part, n in zip(parts, frames, shares, strict=True)]


def uniform(num_frames: int, n: int) -> list[int]:
    """n of num_frames frame numbers, the first and the last among them; the authors' rule."""
    if not 1 <= n <= num_frames:
        raise ValueError(f"can not take {n} of {num_frames} frames")
    return [int(index) for index in np.linspace(0, num_frames - 1, n).astype(int)]


def part_frames(info: VideoInfo, start: float | None = None, end: float | None = None) -> range:
    """The frames that begin in [start, end); where none does, the one shown at start. VideoError past the end."""
    first, last = _bounds(info, start, end)
    begin, stop = bisect_left(info.timestamps, first - 1e-6), bisect_left(info.timestamps, last - 1e-6)
    return range(begin, stop) if begin < stop else range(max(0, begin - 1), max(1, begin))


def part_seconds(info: VideoInfo, start: float | None = None, end: float | None = None) -> float:
    first, last = _bounds(info, start, end)
    return last - first


def spread(info: VideoInfo, part: range, n: int) -> list[int]:
    """n frames of a part, evenly spread in time, its first and last among them."""
    chosen = [part.start + index for index in uniform(len(part), n)]
    times = info.timestamps[part.start : part.stop]
    if n < 3 or n == len(part) or constant_rate(times):
        return chosen
    moments = np.linspace(times[0], times[-1], n)
    shown = np.searchsorted(times, moments + 1e-6, side="right") - 1
    return [part.start + index for index in _without_repeats(shown.tolist(), len(part))]


def constant_rate(times: Sequence[float]) -> bool:
    """Whether every frame stands where an even rate puts it, within RATE_SLACK of the time between two."""
    if len(times) < 3:
        return True
    even = np.linspace(times[0], times[-1], len(times))
    gap = (times[-1] - times[0]) / (len(times) - 1)
    return bool(np.abs(np.asarray(times) - even).max() <= RATE_SLACK * gap)


def seconds_per_frame(info: VideoInfo, indices: Sequence[int]) -> float:
    """The mean time between two chosen frames; for a single one, how long the video lasts."""
    if len(indices) < 2:
        return info.duration
    gaps = [info.timestamps[after] - info.timestamps[before] for before, after in pairwise(indices)]
    return sum(gaps) / len(gaps)


def share_out(total: int, weights: Sequence[float], room: Sequence[int]) -> list[int]:
    """total things to takers by weight, at least one and at most their room each; what is left goes by largest lack."""
    assert len(weights) <= total <= sum(room)
    shares = [1] * len(weights)
    for _ in range(total - len(weights)):
        open_ones = [taker for taker in range(len(weights)) if shares[taker] < room[taker]]
        shares[max(open_ones, key=lambda taker: (weights[taker] / (shares[taker] + 0.5), -taker))] += 1
    return shares


def _without_repeats(indices: list[int], available: int) -> list[int]:
    """The nearest rising numbers without repeats: a frame shown long is taken once, its neighbours make up for it."""
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
