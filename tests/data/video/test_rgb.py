"""Pictures as RGB against the definition in fp64, and against FFmpeg's exact conversion."""

import av
import numpy as np
import pytest
import torch

from synpo_fast.data.video import rgb
from synpo_fast.data.video.decode import decode_frames
from synpo_fast.data.video.rgb import RgbWriter
from synpo_fast.ops import native_library
from synpo_fast.testing.clips import draw_frame, write_clip

needs_native = pytest.mark.skipif(not native_library.is_available(), reason="the native library is not built")
SIZES = [(2, 2), (2, 10), (10, 2), (4, 6), (16, 32), (30, 34), (64, 64), (50, 98), (120, 162)]  # height, width
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


def written(frame):
    out = np.empty((frame.height, frame.width, 3), np.uint8)
    RgbWriter().write(frame, out)
    return out


def converted(frame, at_left):
    """By our converter alone: a frame made by hand states no place of its chroma."""
    out = np.full((frame.height, frame.width, 3), 77, np.uint8)
    rgb._convert(frame, out, rgb.LUMA_WEIGHTS[int(frame.colorspace)], at_left)
    return out


def by_ffmpeg(frame):
    return rgb._by_ffmpeg(frame).copy()


@needs_native
@pytest.mark.parametrize("at_left", [True, False], ids=["left", "between"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_colours_are_those_of_the_definition(at_left, size):
    frame, planes = picture(*size)
    truth = by_definition(planes, across="left" if at_left else "between", weights=(0.299, 0.114), full_range=False)
    error = np.abs(converted(frame, at_left) - truth)
    assert error.max() < 0.6, "half a level is rounding, the rest that of 16-bit products"


@needs_native
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_and_range(matrix, full_range):
    frame, planes = picture(40, 66, matrix=matrix, full_range=full_range)
    truth = by_definition(planes, across="left", weights=MATRICES[matrix], full_range=full_range)
    assert np.abs(converted(frame, True) - truth).max() < 0.6


@needs_native
def test_ffmpegs_exact_conversion_agrees():
    frame, _ = picture(122, 162)  # FFmpeg takes its chroma as between the pixels
    ours, theirs = converted(frame, False), by_ffmpeg(frame)
    assert not np.array_equal(ours, theirs), "the same path was taken twice"
    assert np.abs(ours.astype(int) - theirs).max() <= 1


STATED = [
    ("h264", ".mp4", {}, True),
    ("h264", ".mp4", {"options": {"x264-params": "chromaloc=1"}}, False),
    ("h264", ".mp4", {"options": {"x264-params": "chromaloc=2"}}, "elsewhere"),
    ("hevc", ".mp4", {"options": {"x265-params": "log-level=none:chromaloc=2:pools=none"}}, "elsewhere"),
    ("vp9", ".webm", {}, False),
    ("vp9", ".webm", {"options": {"chroma_sample_location": "left"}}, True),
    ("av1", ".mp4", {"options": {"chroma_sample_location": "left"}}, True),
    ("mjpeg", ".avi", {}, False),
]


@needs_native
@pytest.mark.parametrize(("codec", "suffix", "more", "where"), STATED, ids=str)
def test_where_chroma_lies_is_found_out(tmp_path, codec, suffix, more, where):
    path = write_clip(tmp_path / f"clip{suffix}", codec=codec, num_frames=4, width=96, height=64, **more)
    writer = RgbWriter()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            out = np.empty((64, 96, 3), np.uint8)
            writer.write(frame, out)
            assert np.abs(out.astype(int) - by_ffmpeg(frame)).max() <= 1
    assert ("elsewhere" if writer.is_other else writer.at_left) == where


@needs_native
def test_pictures_without_coloured_edges_leave_it_open(monkeypatch):
    asked = []
    monkeypatch.setattr(rgb, "_by_ffmpeg", asked.append)
    frame, _ = picture(32, 48)
    for plane in frame.planes[1:]:
        plane.update(bytes([90]) * (plane.height * plane.line_size))
    writer = RgbWriter()
    out = np.zeros((32, 48, 3), np.uint8)
    for _ in range(2):
        writer.write(frame, out)
    assert writer.at_left is None and not asked
    assert np.array_equal(out, converted(frame, True))


@needs_native
def test_a_picture_with_too_little_colour_decides_nothing(monkeypatch):
    """Black but for one sample of chroma."""
    frame, _ = picture(64, 96)
    for plane, value in zip(frame.planes, (16, 128, 128), strict=True):
        rows = np.full((plane.height, plane.line_size), value, np.uint8)
        if value == 128:
            rows[10, 20] = 160
        plane.update(rows.tobytes())
    exact = {True: converted(frame, True), False: converted(frame, False)}
    assert not np.array_equal(exact[True], exact[False])
    monkeypatch.setattr(rgb, "_ROW_STEP", 1)
    monkeypatch.setattr(rgb, "_by_ffmpeg", lambda _: exact[True])
    writer = RgbWriter()
    out = np.zeros((64, 96, 3), np.uint8)
    writer.write(frame, out)
    assert writer.at_left is True and np.array_equal(out, exact[True]), "the few values tell"
    monkeypatch.setattr(rgb, "_ROW_STEP", 60)  # none of them is looked at
    writer = RgbWriter()
    writer.write(frame, out)
    assert writer.at_left is None and not writer.is_other and np.array_equal(out, exact[True])


@needs_native
@pytest.mark.parametrize("codec", ["h264", "mpeg2video"])
def test_interlaced_pictures_are_ffmpegs(tmp_path, codec):
    """Their chroma belongs to a field, not to the picture."""
    options = {"x264-params": "tff=1"} if codec == "h264" else {"flags": "+ildct+ilme", "top": "1"}
    with av.open(str(tmp_path / "clip.ts"), "w") as container:
        stream = container.add_stream("libx264" if codec == "h264" else codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 96, 64, "yuv420p", options
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(draw_frame(index, 96, 64), format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = decode_frames(tmp_path / "clip.ts")
    with av.open(str(tmp_path / "clip.ts")) as container:
        for ours, frame in zip(frames, container.decode(video=0), strict=True):
            assert frame.interlaced_frame and np.array_equal(ours.numpy(), by_ffmpeg(frame))


@needs_native
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_writes_nothing_beside_its_place(size):
    height, width = size
    frames = np.full((3, height, width, 3), 77, np.uint8)
    frame, _ = picture(*size)
    rgb._convert(frame, frames[1], (0.299, 0.114), True)
    assert (frames[0] == 77).all() and (frames[2] == 77).all() and np.array_equal(frames[1], converted(frame, True))


@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv422p", "gray", "yuv420p10le", "rgb24", "yuv420p"])
def test_other_formats_and_odd_sizes_are_left_to_ffmpeg(pixel_format):
    frame, _ = picture(34, 61, pixel_format=pixel_format)
    exact = av.video.reformatter.Interpolation.BILINEAR | av.video.reformatter.Interpolation.FULL_CHR_H_INT
    exact |= av.video.reformatter.Interpolation.ACCURATE_RND
    assert np.array_equal(written(frame), frame.to_ndarray(format="rgb24", interpolation=exact))


@pytest.mark.parametrize("matrix", [0, 4])  # RGB as it is, FCC
def test_other_matrices_are_left_to_ffmpeg(matrix, monkeypatch):
    monkeypatch.setattr(rgb, "_native", lambda: pytest.fail("asked for the native library"))
    frame, _ = picture(34, 62, matrix=matrix)
    assert written(frame).std() > 10


def test_says_once_that_the_library_is_missing(monkeypatch, caplog):
    monkeypatch.setattr(native_library, "reason_unavailable", lambda: "it was not built")
    rgb._native.cache_clear()
    try:
        for _ in range(3):
            written(picture(16, 16)[0])
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
