"""The eight ways in which a container may want its pictures shown, in every backend, against FFmpeg's own filters."""

import math
import time
import types

import av
import numpy as np
import pytest
import torch

from synpo_fast.data.video import decode_torchcodec
from synpo_fast.data.video.decode import available_backends, decode_frames, probe_video
from synpo_fast.data.video.orientation import matrix_orientation
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.testing.clips import display_matrix, draw_frame, read_barcode, write_clip
from tests.data.video.test_decode_torchcodec import stand_in

EIGHT = [(rotation, mirrored) for rotation in (0, 90, 180, 270) for mirrored in (False, True)]
ONE = 65536


def ffmpeg_filters(matrix):
    """The filters that the ffmpeg command inserts for a display matrix (configure_input_video_filter)."""
    a, b, c, d = (matrix[place] / ONE for place in (0, 1, 3, 4))
    angle = math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))  # clockwise
    angle = round(angle) % 360
    if angle == 90:
        return [("transpose", "cclock_flip" if c > 0 else "clock")]
    if angle == 180:
        return [("hflip", None)] * (a < 0) + [("vflip", None)] * (d < 0)
    if angle == 270:
        return [("transpose", "clock_flip" if c < 0 else "cclock")]
    return [("vflip", None)] * (d < 0)


def shown_by_ffmpeg(path, matrix):
    """All frames as FFmpeg's filters turn them, RGB."""
    shown = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        nodes = [graph.add_buffer(template=stream), graph.add("format", "rgb24")]
        nodes += [graph.add(name, options) for name, options in ffmpeg_filters(matrix)]
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        for frame in container.decode(stream):
            graph.push(frame)
            shown.append(graph.pull().to_ndarray(format="rgb24"))
    return np.stack(shown)


def backends(codec):
    names = [name for name in available_backends() if name in ("pyav", "dali", "torchcodec")]
    return [name for name in names if name != "torchcodec" or not decode_torchcodec_missing()]


def decode_torchcodec_missing():
    from tests.data.video.test_decode_torchcodec import MISSING

    return bool(MISSING)


@pytest.mark.parametrize(
    ("suffix", "rotation", "mirrored"),
    [
        *((".mov", *one) for one in EIGHT),
        *((".mkv", *one) for one in EIGHT if not one[1]),
    ],  # Matroska knows an angle alone
)
def test_every_orientation_in_every_backend(tmp_path, suffix, rotation, mirrored):
    """A barcode in one corner can be read in one of the eight orientations only. Both sizes are even, or chroma moves."""
    path = write_clip(
        tmp_path / f"clip{suffix}",
        codec="mjpeg",
        num_frames=4,
        width=98,
        height=64,
        rotation=rotation,
        mirrored=mirrored,
    )
    info = probe_video(path)
    assert (info.rotation, info.mirrored, info.width, info.height) == (rotation, mirrored, 98, 64)
    truth = shown_by_ffmpeg(path, display_matrix(rotation, mirrored))
    for backend in backends("mjpeg"):
        frames, _ = decode_frames(path, backend=backend)
        assert [read_barcode(frame) for frame in frames.numpy()] == [0, 1, 2, 3], backend
        assert frames.is_contiguous() and np.abs(frames.numpy().astype(float) - truth).mean() < 3, backend
        assert np.abs(frames[3].numpy().astype(float) - draw_frame(3, 98, 64)).mean() < 8, backend
        some, _ = decode_frames(path, indices=[3, 1, 3], backend=backend)
        assert torch.equal(some, frames[[3, 1, 3]]), backend


def test_a_mirrored_video_of_a_phone(tmp_path):
    """H.264 in mp4, as a front camera writes it: turned and mirrored, with frames that refer to others."""
    path = write_clip(
        tmp_path / "selfie.mp4",
        codec="h264",
        num_frames=20,
        width=96,
        height=64,
        b_frames=2,
        rotation=90,
        mirrored=True,
    )
    frames, info = decode_frames(path, indices=[17, 3])
    assert [read_barcode(frame) for frame in frames.numpy()] == [17, 3] and (info.width, info.height) == (96, 64)


@pytest.mark.parametrize(("rotation", "mirrored"), EIGHT)
def test_what_torchcodec_turned_is_not_turned_again(tmp_path, monkeypatch, rotation, mirrored):
    """A stand-in that turns frames as torchcodec does: by FFmpeg's angle, which takes a mirroring for half a turn."""
    path = write_clip(
        tmp_path / "clip.mov", codec="mjpeg", num_frames=2, width=98, height=64, rotation=rotation, mirrored=mirrored
    )
    with av.open(str(path)) as container:
        stored = [(frame.to_ndarray(format="rgb24"), frame.rotation) for frame in container.decode(video=0)]

    class Decoder:
        def __init__(self, source, **options):
            self.metadata = types.SimpleNamespace(rotation=float(stored[0][1]))

        def __len__(self):
            return 2

        def get_frames_at(self, indices):
            turned = [np.rot90(*stored[index][:1], stored[index][1] // 90) for index in indices]
            return types.SimpleNamespace(data=torch.from_numpy(np.stack(turned)))

    stand_in(monkeypatch, Decoder)
    info = probe_video(path)
    frames = decode_torchcodec.decode(path, info, [1, 0], device=torch.device("cpu"), deadline=time.monotonic() + 10)
    assert [read_barcode(frame) for frame in frames.numpy()] == [1, 0]


@pytest.mark.parametrize(
    ("matrix", "read"),
    [
        ([ONE // 2, 0, 0, 0, ONE // 2, 0, 0, 0, 2**30], (0, False)),  # half the size is the same picture
        ([0, -3 * ONE, 0, -3 * ONE, 0, 0, 0, 0, 2**30], (270, True)),
        ([-65535, 4, 0, 3, 65536, 0, 7 * ONE, 9 * ONE, 2**30], (0, True)),  # moved, and rounded on the way
        ([-ONE, 5, 0, -5, -ONE, 0, 0, 0, 2**30], (180, False)),
    ],
)
def test_scale_place_and_rounding_do_not_matter(matrix, read):
    assert matrix_orientation("v", tuple(matrix)) == read


COS, SIN = round(ONE * math.cos(math.radians(17))), round(ONE * math.sin(math.radians(17)))


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        ([COS, -SIN, 0, SIN, COS, 0, 0, 0, 2**30], "is to be turned by 17 degrees; only multiples of 90"),
        ([COS, SIN, 0, -SIN, COS, 0, 0, 0, 2**30], "is to be turned by 343 degrees"),
        ([-COS, SIN, 0, SIN, COS, 0, 0, 0, 2**30], "is to be turned by"),
        ([2 * ONE, 0, 0, 0, ONE, 0, 0, 0, 2**30], "width scaled by 2 relative to its height"),
        ([ONE, 0, 0, ONE // 3, ONE, 0, 0, 0, 2**30], "has a display matrix with a shear"),
        # Whole numbers, and a determinant of one.
        ([ONE, 256 * ONE, 0, 0, ONE, 0, 0, 0, 2**30], "has a display matrix with a shear"),
        ([0, 0, 0, 0, ONE, 0, 0, 0, 2**30], "a display matrix that shows no picture"),
    ],
)
def test_other_matrices_are_refused_by_name(tmp_path, matrix, reason):
    path = write_clip(tmp_path / "odd.mp4", codec="h264", num_frames=2, width=64, height=48, mirrored=True)
    content = path.read_bytes()
    at = content.index(b"tkhd") + 4 + 40
    path.write_bytes(
        content[:at] + b"".join(value.to_bytes(4, "big", signed=True) for value in matrix) + content[at + 36 :]
    )
    with pytest.raises(VideoError, match=rf"odd.mp4: .*{reason}"):
        probe_video(path)
