"""VideoInfo, the properties of a video, and VideoError, the error for a video that cannot be used."""

from dataclasses import dataclass
from fractions import Fraction


class VideoError(ValueError):
    """Raised for a video that cannot be used. The message names the file and the reason."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.path, self.reason)  # needed to send it between processes


CHOOSE_AUTO = "auto as backend"  # the end of every reason that another backend would remove


class BackendRefusal(VideoError):
    """Raised for a video that this backend cannot decode correctly but another one can."""


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video that are needed to select and decode its frames.

    Args:
        codec: FFmpeg's name of the codec; "images" for a folder of frames.
        width, height: of the frames as returned, upright.
        num_frames: the number of frames in the video.
        duration: in seconds, from the first frame's start to the last one's end.
        timestamps: the time at which each frame is shown, in seconds from the first frame, rising; [num_frames].
        keyframes: indices of frames at which decoding can start.
        rotation, mirrored: the orientation that the container states: stored pictures are mirrored left to right or not, then
            turned by 0, 90, 180 or 270 degrees counter-clockwise.
        first_pts, time_base: frame i has the container's timestamp first_pts + timestamps[i] / time_base, if by_order is
            False.
        by_order: True if the container's timestamps do not identify frames, so that frames have to be counted.
        cut_off: the part missing at the end of the file, as part of a message; "" if the file is complete.
        backend, indices: the backend that decoded and the frames in the order returned; empty if nothing was decoded.
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
        """The average number of frames per second."""
        return self.num_frames / self.duration

    @property
    def times(self) -> tuple[float, ...]:
        """The times at which the returned frames are shown, in seconds."""
        return tuple(self.timestamps[index] for index in self.indices)
