"""Decoded pictures as RGB, one way for all codecs: chroma interpolated, colours rounded to the nearest.

PyAV's default conversion repeats each chroma sample over four pixels, which moves and jags coloured edges: 38 to 42 dB away from
the definition, and from what DALI gives. FFmpeg's exact conversion takes as long as decoding does. So 8-bit 4:2:0 of even
sizes, which nearly every video is, is converted by csrc/yuv_to_rgb.cpp; all else, and everything where that is not built, by
FFmpeg with the exact settings. The two differ by one level at most in colours that a screen can show. (Of odd sizes FFmpeg
stretches the chroma by half a pixel; there we do as it does, so that all backends return the same frames.)

Where a video's chroma samples lie FFmpeg knows and PyAV does not tell. So the first picture in which it matters is converted
by FFmpeg and in both common ways, and the rest of the video in the way that agrees; if none does, by FFmpeg.
"""

import functools
import logging
import threading
from typing import Any

import numpy as np
import torch

from synpo_fast.ops import native_library

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Weights of red and blue in luma, by FFmpeg's AVColorSpace. Unspecified is BT.601, as FFmpeg takes it.
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
# What may differ by more than a level where chroma is laid alike: FFmpeg lets sums overflow in colours that no screen can show.
_MOST_STRAYS = 1e-3
_ROW_STEP = 7  # odd: rows of both kinds, on and between the rows of chroma

log = logging.getLogger(__name__)
_kept = threading.local()


class RgbWriter:
    """Writes frames of one video, whose chroma lies in one way."""

    def __init__(self) -> None:
        # Chroma samples lie on the left pixel of two, or between them, or elsewhere; None: not known yet.
        self.at_left: bool | None = None
        self.is_other = False

    def write(self, frame: Any, out: Pixels) -> None:
        """out, contiguous [H, W, 3], becomes the frame as stored, not turned."""
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
        if np.array_equal(left[::_ROW_STEP], out[::_ROW_STEP]) and np.array_equal(left, out):  # no coloured edge in it
            return
        exact = _by_ffmpeg(frame)
        if_between, if_left = _strays(out, exact), _strays(left, exact)
        if min(if_between, if_left) > _MOST_STRAYS:
            self.is_other = True
        elif 4 * if_between < if_left:
            self.at_left = False
        elif 4 * if_left < if_between:
            self.at_left = True
        # Else there is too little colour to tell: the next picture may have more.
        if self.at_left is True:
            out[...] = left
        elif self.at_left is None:
            out[...] = exact


def _by_ffmpeg(frame: Any) -> Pixels:
    """[H, W, 3], in FFmpeg's own memory."""
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
    """FFmpeg's converter, which takes longer to set up than to use: it is kept for the next video of the same size."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_kept, "reformatter"):
        _kept.reformatter = VideoReformatter()
    return _kept.reformatter


def _strays(one: Pixels, other: Pixels) -> float:
    """The share of values that are apart by more than rounding, in a part of the rows."""
    one, other = one[::_ROW_STEP], other[::_ROW_STEP]
    apart = np.maximum(one, other) - np.minimum(one, other)
    return float(np.count_nonzero(apart > 1)) / apart.size


@functools.cache
def _native() -> bool:
    reason = native_library.why_unavailable()
    if reason is not None:
        log.warning("frames are converted by FFmpeg, which takes as long as decoding them: %s", reason)
    return reason is None
