"""What is known of a video, and the one error for a video that can not be used."""

from dataclasses import dataclass
from fractions import Fraction


class VideoError(ValueError):
    """A video that can not be used. The message names the file and says what is wrong with it."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)  # it travels between processes


class BackendRefusal(VideoError):
    """A video that this backend can not give rightly and another one can."""


@dataclass(frozen=True)
class VideoInfo:
    """A video as a reader of frames sees it.

    Args:
        codec: FFmpeg's name, "images" for a folder of frames.
        width, height: of the frames as returned, upright.
        num_frames: how many there are.
        duration: in seconds, from the first frame's start to the last one's end.
        timestamps: when each of all frames is shown, in seconds from the first frame, rising; [num_frames].
        keyframes: indices of frames that decoding can start from.
        rotation, mirrored: how the container wants stored pictures to be shown: mirrored left to right or not, then turned by
            0, 90, 180 or 270 degrees counter-clockwise.
        first_pts, time_base: frame i carries the container's timestamp first_pts + timestamps[i] / time_base, if by_order is
            False.
        by_order: the container's timestamps cannot tell frames apart, so that they have to be counted.
        cut_off: what the end of a file lacks that its container states, as part of a message; "" where it is whole.
        backend, indices: who decoded, and which frames, in the order returned; empty when nothing was decoded.
    """

    path: str
    codec: str
    width: int
    height: int
    num_frames: int
    duration: float
    timestamps: tuple[float, ...]
    keyframes: tuple[int, ...] = ()
    rotation: int = 0
    mirrored: bool = False
    cut_off: str = ""
    first_pts: int = 0
    time_base: Fraction = Fraction(1)
    by_order: bool = False
    backend: str = ""
    indices: tuple[int, ...] = ()

    @property
    def fps(self) -> float:
        """The average rate."""
        return self.num_frames / self.duration

    @property
    def times(self) -> tuple[float, ...]:
        """When the returned frames are shown, in seconds."""
        return tuple(self.timestamps[index] for index in self.indices)
