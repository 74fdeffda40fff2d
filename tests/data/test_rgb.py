"""Pictures as RGB against the definition in fp64, and against FFmpeg's exact conversion."""

import av
import numpy as np
import pytest
import torch

from synpo_fast.data import rgb
from synpo_fast.data.rgb import RgbWriter
from synpo_fast.ops import native_library

needs_native = pytest.mark.skipif(not native_library.is_available(), reason="the native library is not built")
SIZES = [(2, 2), (2, 10), (10, 2), (4, 6), (16, 32), (30, 34), (64, 64), (50, 98), (120, 162)]  # height, width
CODECS = {"h264": "left", "vp9": "between"}
MATRICES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def picture(height, width, *, matrix=2, full_range=False, pixel_format="yuv420p", seed=0):
    """A frame of noise, all values included, and its planes."""
    rng = np.random.default_rng(seed)
    frame = av.VideoFrame(width, height, pixel_format)
    planes = []
    for plane in frame.planes:
        rows = rng.integers(0, 256, (plane.height, plane.line_size), dtype=np.uint8)
        plane.update(rows.tobytes())
        planes.append(rows[:, : plane.width])
    frame.colorspace = matrix
    frame.color_range = 2 if full_range else 1
    return frame, planes


def resampled(chroma, size, centre_offset, axis):
    """Linear interpolation at pixel x of samples that lie at 2 i + centre_offset; the edge goes on."""
    at = (np.arange(size) - centre_offset) / 2
    known = np.arange(chroma.shape[axis])
    return np.apply_along_axis(lambda line: np.interp(at, known, line), axis, chroma.astype(np.float64))


def by_definition(planes, *, across, weights, full_range):
    height, width = planes[0].shape
    luma = planes[0].astype(np.float64)
    blue, red = (
        resampled(resampled(chroma, height, 0.5, 0), width, {"left": 0.0, "between": 0.5}[across], 1) - 128
        for chroma in planes[1:]
    )
    if not full_range:
        luma, blue, red = (luma - 16) * 255 / 219, blue * 255 / 224, red * 255 / 224
    kr, kb = weights
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return np.clip(np.stack([r, g, b], -1), 0, 255)


def written(frame, codec):
    out = np.full((frame.height, frame.width, 3), 77, np.uint8)
    RgbWriter(codec).write(frame, out)
    return out


@needs_native
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_colours_are_those_of_the_definition(codec, size):
    frame, planes = picture(*size)
    truth = by_definition(planes, across=CODECS[codec], weights=(0.299, 0.114), full_range=False)
    error = np.abs(written(frame, codec) - truth)
    assert error.max() < 0.6, "half a level is rounding, the rest that of 16-bit products"


@needs_native
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_and_range(matrix, full_range):
    frame, planes = picture(40, 66, matrix=matrix, full_range=full_range)
    truth = by_definition(planes, across="left", weights=MATRICES[matrix], full_range=full_range)
    assert np.abs(written(frame, "h264") - truth).max() < 0.6


@needs_native
@pytest.mark.parametrize("codec", ["h264", "hevc", "mpeg2video", "mpeg4"])
def test_ffmpegs_exact_conversion_agrees_where_it_lays_chroma_alike(codec, monkeypatch):
    """A frame made by hand states no place of its chroma, which FFmpeg takes as between the pixels."""
    monkeypatch.setitem(rgb.CHROMA_AT_LEFT, codec, False)
    frame, _ = picture(122, 162)
    ours = written(frame, codec)
    monkeypatch.setattr(rgb, "_native", lambda: False)
    theirs = written(frame, codec)
    assert not np.array_equal(ours, theirs), "the same path was taken twice"
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@needs_native
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_writes_nothing_beside_its_place(size):
    height, width = size
    frames = np.full((3, height, width, 3), 77, np.uint8)
    frame, _ = picture(*size)
    RgbWriter("h264").write(frame, frames[1])
    assert (frames[0] == 77).all() and (frames[2] == 77).all() and np.array_equal(frames[1], written(frame, "h264"))


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv422p", "gray", "yuv420p10le", "rgb24", "yuv420p"])
def test_other_formats_and_odd_sizes_are_left_to_ffmpeg(pixel_format):
    frame, _ = picture(34, 61, pixel_format=pixel_format)
    exact = av.video.reformatter.Interpolation.BILINEAR | av.video.reformatter.Interpolation.FULL_CHR_H_INT
    exact |= av.video.reformatter.Interpolation.ACCURATE_RND
    assert np.array_equal(written(frame, "h264"), frame.to_ndarray(format="rgb24", interpolation=exact))


@pytest.mark.parametrize("matrix", [0, 4])  # RGB as it is, FCC
def test_other_matrices_are_left_to_ffmpeg(matrix, monkeypatch):
    monkeypatch.setattr(rgb, "_native", lambda: pytest.fail("asked for the native library"))
    frame, _ = picture(34, 62, matrix=matrix)
    assert written(frame, "h264").std() > 10


def test_says_once_that_the_library_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(native_library, "why_unavailable", lambda: "it was not built")
    rgb._native.cache_clear()
    try:
        for _ in range(3):
            written(picture(16, 16)[0], "h264")
    finally:
        rgb._native.cache_clear()
    assert caplog.text.count("it was not built") == 1


@needs_native
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"luma": torch.zeros(31, dtype=torch.uint8)}, "luma has 31 bytes"),
        ({"red": torch.zeros(7, dtype=torch.uint8)}, "red has 7 bytes"),
        ({"luma_stride": 7}, "luma has 32 bytes"),
        ({"blue_stride": -4}, "blue has"),
        ({"luma": torch.zeros(32)}, "contiguous uint8"),
        ({"out": torch.zeros(4, 8, 3)}, "out must be"),
        ({"out": torch.zeros(4, 8, 4, dtype=torch.uint8)}, "out must be"),
        ({"out": torch.zeros(0, 8, 3, dtype=torch.uint8)}, "out must be"),
        ({"out": torch.zeros(8, 4, 3, dtype=torch.uint8).transpose(0, 1)}, "out must be"),
        ({"red_weight": 0.9, "blue_weight": 0.2}, "parts of 1"),
    ],
)
def test_wrong_arguments_are_errors(change, says):
    byte = {"dtype": torch.uint8}
    arguments = {"luma": torch.zeros(32, **byte), "blue": torch.zeros(8, **byte), "red": torch.zeros(8, **byte)}
    arguments |= {"luma_stride": 8, "blue_stride": 4, "red_stride": 4, "out": torch.zeros(4, 8, 3, **byte)}
    arguments |= {"red_weight": 0.3, "blue_weight": 0.1, "full_range": False, "chroma_at_left": True}
    torch.ops.synpo_fast_native.yuv420_to_rgb(**arguments)
    with pytest.raises(ValueError, match=says):
        torch.ops.synpo_fast_native.yuv420_to_rgb(**(arguments | change))
