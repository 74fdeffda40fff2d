"""Decoded pictures as RGB, one way for all codecs: chroma interpolated, colours rounded to the nearest.

PyAV's default conversion repeats each chroma sample over four pixels, which moves and jags coloured edges: 38 to 42 dB away from
the definition, and from what DALI gives. FFmpeg's exact conversion takes as long as decoding does. So 8-bit 4:2:0 of even
sizes, which nearly every video is, is converted by csrc/yuv_to_rgb.cpp; all else, and everything where that is not
built, by FFmpeg with the exact settings. The two differ by one level at most. (Of odd sizes FFmpeg stretches the chroma by half a
pixel; there we do as it does, so that all backends return the same frames.)
"""

import functools
import logging
from typing import Any

import numpy as np
import torch

from synpo_fast.ops import native_library

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
# Where chroma samples lie across, as FFmpeg's decoders state it when the file does not: on the left pixel of two, or between.
# PyAV does not show what a file states; where it states something else, chroma is half a pixel off.
CHROMA_AT_LEFT = {
    "h264": True,
    "hevc": True,
    "mpeg2video": True,
    "mpeg4": True,
    "av1": False,
    "mjpeg": False,
    "vp8": False,
    "vp9": False,
}

log = logging.getLogger(__name__)


class RgbWriter:
    """Writes frames of one video; it keeps FFmpeg's converter between them."""

    def __init__(self, codec: str) -> None:
        """codec: by its own name; one that CHROMA_AT_LEFT does not know is left to FFmpeg."""
        from av.video.reformatter import VideoReformatter

        self.at_left = CHROMA_AT_LEFT.get(codec)
        self.by_ffmpeg = VideoReformatter()

    def write(self, frame: Any, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """out, contiguous [H, W, 3], becomes the frame as stored, not turned."""
        is_known = frame.format.name in ("yuv420p", "yuvj420p") and frame.width % 2 == 0 == frame.height % 2
        weights = LUMA_WEIGHTS.get(int(frame.colorspace))
        if not is_known or weights is None or self.at_left is None or not _native():
            self._write_by_ffmpeg(frame, out)
            return
        is_full = frame.format.name == "yuvj420p" or int(frame.color_range) == FULL_RANGE
        planes = [torch.frombuffer(memoryview(plane), dtype=torch.uint8) for plane in frame.planes]
        strides = [plane.line_size for plane in frame.planes]
        torch.ops.synpo_fast_native.yuv420_to_rgb(
            *planes, *strides, torch.from_numpy(out), *weights, is_full, self.at_left
        )

    def _write_by_ffmpeg(self, frame: Any, out: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        from av.video.reformatter import Interpolation

        exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        picture = self.by_ffmpeg.reformat(frame, format="rgb24", interpolation=exact, threads=1)
        plane = picture.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(frame.height, plane.line_size)
        out[...] = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)


@functools.cache
def _native() -> bool:
    reason = native_library.why_unavailable()
    if reason is not None:
        log.warning("frames are converted by FFmpeg, which takes as long as decoding them: %s", reason)
    return reason is None
