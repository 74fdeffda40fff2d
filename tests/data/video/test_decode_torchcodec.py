"""torchcodec beside PyAV, where it and an FFmpeg for it are installed; what it says where they are not."""

import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from synpo_fast.data.video import decode_torchcodec
from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.testing.clips import read_barcode, write_clip

CPU = torch.device("cpu")


def why_missing() -> str:
    try:
        decoder = decode_torchcodec._video_decoder()
        decoder(b"no video")
    except ImportError as error:
        return str(error)
    except (RuntimeError, ValueError) as error:
        return str(error) if decode_torchcodec.NOT_LOADED in str(error) else ""
    return ""


MISSING = why_missing()
needs_torchcodec = pytest.mark.skipif(bool(MISSING), reason=MISSING[:150])


def barcodes(frames: torch.Tensor) -> list[int]:
    return [read_barcode(frame) for frame in frames.numpy()]


@needs_torchcodec
@pytest.mark.parametrize(
    ("codec", "file", "width", "height", "b_frames"),
    [
        ("h264", "clip.mp4", 320, 240, 2),
        ("hevc", "clip.mkv", 162, 122, 2),
        ("vp9", "clip.webm", 163, 121, 0),
        ("mjpeg", "clip.avi", 161, 99, 0),
        ("av1", "clip.mp4", 160, 120, 0),
    ],
)
def test_frames_are_pyavs(tmp_path, codec, file, width, height, b_frames):
    path = write_clip(
        tmp_path / file, codec=codec, num_frames=40, width=width, height=height, keyframe_every=9, b_frames=b_frames
    )
    wanted = [39, 0, 17, 18, 17, *range(20)]  # more than one group, with repeats
    frames, info = decode_frames(path, indices=wanted, backend="torchcodec")
    assert barcodes(frames) == wanted and info.backend == "torchcodec"
    by_pyav, _ = decode_frames(path, indices=wanted, backend="pyav")
    assert np.mean((frames.numpy().astype(float) - by_pyav.numpy()) ** 2) < 6.5, "40 dB"


@needs_torchcodec
@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_upright(tmp_path, rotation):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=4, width=98, height=64, rotation=rotation)
    assert barcodes(decode_frames(path, indices=[3, 1], backend="torchcodec")[0]) == [3, 1]


@needs_torchcodec
def test_variable_frame_rate_is_by_index(tmp_path):
    times = [0, 0.04, 0.5, 0.52, 1.4, 1.44, 3.0, 3.04]
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=8, width=64, height=64, times=times)
    assert barcodes(decode_frames(path, times=[0.6, 3.05, 0.1], backend="torchcodec")[0]) == [3, 7, 1]


@needs_torchcodec
def test_bad_files_and_wrong_counts_are_named(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=6, width=64, height=64)
    info = probe_video(path)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(path.read_bytes()[:300])
    later = time.monotonic() + 10
    with pytest.raises(VideoError, match=r"cut\.mp4"):
        decode_torchcodec.decode(cut, info, [0], device=CPU, deadline=later)
    with pytest.raises(VideoError, match="counts 6 frames where the container has 9"):
        decode_torchcodec.decode(path, replace(info, num_frames=9), [0], device=CPU, deadline=later)
    with pytest.raises(VideoError, match="took too long"):
        decode_torchcodec.decode(path, info, [0], device=CPU, deadline=time.monotonic() - 1)
    assert barcodes(decode_frames(path, indices=[5], backend="torchcodec")[0]) == [5]


def stand_in(monkeypatch, decoder) -> None:
    """A torchcodec whose VideoDecoder is `decoder`; this shows the use of its documented interface, not its behaviour."""
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = decoder
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)


def test_asks_for_each_frame_once_in_groups_and_one_thread(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=40, width=64, height=48)
    info, calls, settings = probe_video(path), [], {}

    class Decoder:
        def __init__(self, source, **options):
            settings.update(options, source=source)
            self.metadata = types.SimpleNamespace(rotation=None)

        def __len__(self):
            return 40

        def get_frames_at(self, indices):
            calls.append(list(indices))
            numbers = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None]
            return types.SimpleNamespace(data=numbers.expand(-1, 48, 64, 3))

    stand_in(monkeypatch, Decoder)
    wanted = [39, 2, 2, *range(20, 38)]
    frames = decode_torchcodec.decode(path, info, wanted, device=CPU, deadline=time.monotonic() + 10)
    assert frames[:, 0, 0, 0].tolist() == wanted and frames.shape == (21, 48, 64, 3)
    assert [index for call in calls for index in call] == sorted(set(wanted)), "each once, rising: no seeking back"
    assert len(calls) == 2 and settings["source"] == path
    assert settings["seek_mode"] == "exact" and settings["num_ffmpeg_threads"] == 1
    assert settings["dimension_order"] == "NHWC" and settings["device"] == CPU


def test_a_missing_ffmpeg_is_no_fault_of_the_video(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=3, width=64, height=48)

    def decoder(source, **options):
        raise RuntimeError("Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed")

    stand_in(monkeypatch, decoder)
    with pytest.raises(ImportError, match=r"pip install torchcodec.*FFmpeg") as caught:
        decode_torchcodec.decode(path, probe_video(path), [0], device=CPU, deadline=time.monotonic() + 10)
    assert "Likely causes" in str(caught.value) and str(path) not in str(caught.value)


def test_the_package_is_named_when_missing(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=3, width=64, height=48)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match="torchcodec backend cannot be loaded"):
        decode_torchcodec.decode(path, probe_video(path), [0], device=CPU, deadline=time.monotonic() + 10)
