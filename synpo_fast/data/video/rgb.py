"""Converts decoded pictures to RGB, alike for all codecs: chroma is interpolated, colours are rounded to the nearest.

PyAV's default conversion repeats each chroma sample over four pixels, which shifts coloured edges and makes them jagged. Its
PSNR is 38 to 42 dB against the definition, and against DALI. FFmpeg's exact conversion takes as long as decoding. Nearly every
video is 8-bit 4:2:0 with an even size, and csrc/yuv_to_rgb.cpp converts these. FFmpeg converts all others with the exact
settings, and every video if the C++ code is not built. The two differ by at most one level in colours that a screen can show.
(For odd sizes FFmpeg stretches the chroma by half a pixel. We keep that, so that all backends return the same frames.)

FFmpeg knows the positions of a video's chroma samples, but PyAV does not expose them. So the first picture in which they matter
is converted by FFmpeg and with both common positions. The rest of the video uses the positions that agree with FFmpeg, or FFmpeg
itself if neither agrees.
"""

import functools
import logging
import threading
from typing import Any

import numpy as np
import torch

from synpo_fast.ops import native_library

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Weights of red and blue in luma, by FFmpeg's AVColorSpace. 2 is unspecified, which FFmpeg treats as BT.601.
BT601 = (0.299, 0.114)
LUMA_WEIGHTS = {
    1: (0.2126, 0.0722),  # BT.709
    2: BT601,
    5: BT601,
    6: BT601,
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
}
FULL_RANGE = 2  # AVCOL_RANGE_JPEG
# The share of values that may differ by more than a level with the same chroma positions: FFmpeg lets sums overflow in colours
# that no screen can show.
_MOST_STRAYS = 1e-3
_ROW_STEP = 7  # odd, so that it covers rows on and between the rows of chroma

log = logging.getLogger(__name__)
_kept = threading.local()


class RgbWriter:
    """Writes the frames of one video. All of them have the same chroma positions."""

    def __init__(self) -> None:
        # True: chroma samples lie on the left of two pixels. False: between them. None: not known yet. is_other: somewhere else.
        self.at_left: bool | None = None
        self.is_other = False

    def write(self, frame: Any, out: Pixels) -> None:
        """Writes the frame into out, contiguous [H, W, 3], as stored: not turned or mirrored."""
        weights = LUMA_WEIGHTS.get(int(frame.colorspace))
        is_even = frame.width % 2 == 0 == frame.height % 2
        is_plain = is_even and frame.format.name in ("yuv420p", "yuvj420p") and not frame.interlaced_frame
        if self.is_other or not is_plain or weights is None or not _native():
            out[...] = _by_ffmpeg(frame)
        elif self.at_left is None:
            self._find_out(frame, out, weights)
        else:
            _convert(frame, out, weights, self.at_left)

    def _find_out(self, frame: Any, out: Pixels, weights: tuple[float, float]) -> None:
        left = np.empty_like(out)
        _convert(frame, out, weights, False)
        _convert(frame, left, weights, True)
        if np.array_equal(left[::_ROW_STEP], out[::_ROW_STEP]) and np.array_equal(left, out):
            return  # the picture has no coloured edge
        exact = _by_ffmpeg(frame)
        if_between, if_left = _strays(out, exact), _strays(left, exact)
        if min(if_between, if_left) > _MOST_STRAYS:
            self.is_other = True
        elif 4 * if_between < if_left:
            self.at_left = False
        elif 4 * if_left < if_between:
            self.at_left = True
        # Otherwise the picture has too little colour to decide; the next one may have more.
        if self.at_left is True:
            out[...] = left
        elif self.at_left is None:
            out[...] = exact


def _by_ffmpeg(frame: Any) -> Pixels:
    """The frame as RGB [H, W, 3], in memory that FFmpeg owns."""
    from av.video.reformatter import Interpolation

    exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    plane = _reformatter().reformat(frame, format="rgb24", interpolation=exact, threads=1).planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


def _convert(frame: Any, out: Pixels, weights: tuple[float, float], at_left: bool) -> None:
    is_full = frame.format.name == "yuvj420p" or int(frame.color_range) == FULL_RANGE
    luma, blue, red = frame.planes
    torch.ops.synpo_fast_native.yuv420_to_rgb(
        torch.frombuffer(luma, dtype=torch.uint8),
        torch.frombuffer(blue, dtype=torch.uint8),
        torch.frombuffer(red, dtype=torch.uint8),
        luma.line_size,
        blue.line_size,
        red.line_size,
        torch.from_numpy(out),
        *weights,
        is_full,
        at_left,
    )


def _reformatter() -> Any:
    """FFmpeg's converter of this thread. Its set-up takes longer than its use, so it is kept for videos of the same size."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_kept, "reformatter"):
        _kept.reformatter = VideoReformatter()
    return _kept.reformatter


def _strays(one: Pixels, other: Pixels) -> float:
    """The share of values that differ by more than rounding, measured on every _ROW_STEP-th row."""
    one, other = one[::_ROW_STEP], other[::_ROW_STEP]
    apart = np.maximum(one, other) - np.minimum(one, other)
    return float(np.count_nonzero(apart > 1)) / apart.size


@functools.cache
def _native() -> bool:
    reason = native_library.reason_unavailable()
    if reason is not None:
        log.warning("frames are converted by FFmpeg, which takes as long as decoding them: %s", reason)
    return reason is None
