"""decode_frames as a caller meets it: which frames, which errors, which backend; the decoder itself is tested beside it."""

import logging
import time

import av
import pytest
import torch

from synpo_fast.data.video import decode as module
from synpo_fast.data.video import probe
from synpo_fast.data.video.decode import choose_backend, decode_frames, frames_at, open_video_file, probe_video
from synpo_fast.data.video.video_info import BackendRefusal, VideoError
from synpo_fast.testing.clips import read_barcode, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """12 frames, 10 a second, the last shown for as long as the others."""
    return write_clip(
        tmp_path_factory.mktemp("clip") / "clip.mp4", codec="h264", num_frames=12, width=64, height=48, fps=10
    )


def barcodes(frames):
    return [read_barcode(frame.numpy()) for frame in frames]


@pytest.mark.parametrize("indices", [[0], [11], [3, 3, 3], [9, 2, 11, 0, 2], list(range(12))])
def test_frames_come_in_the_order_asked_for(clip, indices):
    frames, info = decode_frames(clip, indices=indices)
    assert barcodes(frames) == indices and info.indices == tuple(indices)
    assert frames.dtype == torch.uint8 and tuple(frames.shape) == (len(indices), 48, 64, 3) and frames.is_contiguous()
    assert info.times == pytest.approx([index / 10 for index in indices])
    assert (info.num_frames, info.backend, info.codec) == (12, "pyav", "h264")
    assert info.duration == pytest.approx(1.2) and info.fps == pytest.approx(10)


def test_no_selection_gives_all_frames_up_to_a_bound(clip, monkeypatch):
    frames, info = decode_frames(clip)
    assert barcodes(frames) == list(range(12)) and info.indices == tuple(range(12))
    monkeypatch.setattr(module, "WHOLE_VIDEO_BYTES", 12 * 64 * 48 * 3 - 1)
    with pytest.raises(ValueError, match="all 12 frames of 64x48 would take"):
        decode_frames(clip)
    assert decode_frames(clip, indices=range(12))[0].shape[0] == 12, "who names frames gets them"


def test_an_empty_selection_gives_no_frames(clip):
    frames, info = decode_frames(clip, indices=[])
    assert tuple(frames.shape) == (0, 48, 64, 3) and info.indices == ()


@pytest.mark.parametrize(
    ("times", "wanted"),
    [
        ([0.0, 0.05, 0.1, 0.199, 0.2], [0, 0, 1, 1, 2]),
        ([-3.0], [0]),
        ([1.1, 1.15, 1.2], [11, 11, 11]),
        ([0.1 + 0.7], [8]),
    ],
)
def test_a_time_gives_the_frame_shown_then(clip, times, wanted):
    frames, info = decode_frames(clip, times=times)
    assert barcodes(frames) == wanted and info.indices == tuple(wanted)


@pytest.mark.parametrize("at", [1.21, 100.0, float("inf"), float("nan")])
def test_a_time_beyond_the_end_is_an_error(clip, at):
    with pytest.raises(VideoError, match=r"clip.mp4: has no frame at .* it lasts 1.200 s"):
        frames_at(probe_video(clip), [0.0, at])


def test_wrong_requests_are_named(clip):
    with pytest.raises(VideoError, match=r"clip.mp4: has no frame 12: it has 12 frames"):
        decode_frames(clip, indices=[0, 12])
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        decode_frames(clip, indices=[0, -1])
    with pytest.raises(ValueError, match="indices or times, not both"):
        decode_frames(clip, indices=[0], times=[0.0])
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*'pyav'.*, got 'ffmpeg'"):
        decode_frames(clip, indices=[0], backend="ffmpeg")
    with pytest.raises(ValueError, match=r"'images' cannot read .*clip.mp4, whose frames are h264"):
        decode_frames(clip, indices=[0], backend="images")


def test_a_package_that_is_missing_is_named_with_the_way_to_get_it(clip, monkeypatch):
    monkeypatch.setitem(
        module.BACKENDS, "dali", ("synpo_fast.data.video.decode_dali", "no_such.package", "pip install it")
    )
    with pytest.raises(ImportError, match=r"the dali backend needs no_such.package: pip install it"):
        decode_frames(clip, indices=[0], backend="dali")
    assert "dali" not in module.available_backends() and "pyav" in module.available_backends()


@pytest.mark.parametrize(
    "answer",
    [torch.zeros(1, 48, 64, 3, dtype=torch.uint8), torch.zeros(2, 48, 64, 3), torch.zeros(2, 64, 48, 3).byte()],
)
def test_a_short_or_misshapen_answer_of_a_backend_is_an_error(clip, monkeypatch, answer):
    monkeypatch.setattr(module, "_load", lambda backend: lambda *args, **options: answer)
    with pytest.raises(VideoError, match=r"pyav returned .*, expected uint8 \[2, 48, 64, 3\]"):
        decode_frames(clip, indices=[0, 1])


def test_a_known_video_is_not_looked_at_again(clip, monkeypatch):
    info = probe_video(clip)
    monkeypatch.setattr(probe, "probe_container", lambda *args: pytest.fail("probed again"))
    frames, again = decode_frames(clip, indices=[5], info=info)
    assert barcodes(frames) == [5] and again.timestamps == info.timestamps


def test_paths_are_relative_to_the_root(clip):
    frames, _ = decode_frames("clip.mp4", indices=[4], root=clip.parent)
    assert barcodes(frames) == [4]
    with pytest.raises(VideoError, match="outside the root"):
        decode_frames(clip, indices=[4], root=clip.parent / "elsewhere")


def test_a_deadline_that_has_passed_is_an_error(clip):
    with pytest.raises(VideoError, match="took too long"):
        decode_frames(clip, indices=[0], deadline_s=0.0)
    info = probe_video(clip)
    with pytest.raises(VideoError, match="took too long"):
        decode_frames(clip, indices=[0], info=info, deadline_s=0.0)


def test_the_deadline_is_looked_at_while_decoding(clip, monkeypatch):
    from synpo_fast.data.video import decode_pyav

    info = probe_video(clip)
    checks = []

    def late(path, deadline, doing):
        checks.append(doing)
        if len(checks) == 3:
            raise VideoError(path, f"took too long: {doing}")

    monkeypatch.setattr(decode_pyav, "check_deadline", late)
    with pytest.raises(VideoError, match="took too long: frame 11 was looked for"):
        decode_pyav.decode(clip, info, [11], device=torch.device("cpu"), deadline=time.monotonic() + 60)


@pytest.mark.parametrize(
    ("codec", "device", "share", "available", "wanted"),
    [
        ("h264", "cpu", 1.0, ["pyav", "dali"], ("pyav", "H.264 on a CPU")),
        ("h264", "cuda", 1.0, ["pyav"], ("pyav", "H.264, and DALI is not installed")),
        ("av1", "cuda", 1.0, ["pyav", "dali"], ("pyav", "av1 has no hardware decoder")),
        ("hevc", "cuda", 0.004, ["pyav", "dali"], ("pyav", "HEVC, 0.4% of its frames wanted")),
        ("hevc", "cuda", 1.0, ["pyav", "dali"], ("dali", "HEVC, 100.0% of its frames wanted, on a GPU")),
        ("images", "cuda", 1.0, ["pyav", "dali"], ("images", "a folder of images")),
    ],
)
def test_the_choice_of_a_backend(codec, device, share, available, wanted):
    assert choose_backend(codec, device, share, available) == wanted


def test_a_file_is_opened_once_and_read_as_often_as_wanted(clip, monkeypatch):
    opened = []
    really = av.open
    monkeypatch.setattr(av, "open", lambda *args, **options: opened.append(args) or really(*args, **options))
    with open_video_file(clip) as video:
        assert video.info.num_frames == 12
        for indices in ([11], [0, 3], [7, 2, 7], [5]):
            frames, info = video.frames(indices)
            assert barcodes(frames) == indices == list(info.indices)
        assert barcodes(video.frames(times=[0.15])[0]) == [1]
    assert len(opened) == 1
    assert barcodes(video.frames([4])[0]) == [4] and len(opened) == 2, "it was closed, so it is opened again"
    decode_frames(clip, indices=[3])
    assert len(opened) == 3


def refuse(*_, **__):
    raise BackendRefusal("clip.mp4", "holds yuv420p10le")


def test_what_one_backend_refuses_auto_takes_from_another(clip, monkeypatch, caplog):
    monkeypatch.setattr(module, "choose_backend", lambda *_: ("dali", "for a test"))
    load = module._load
    monkeypatch.setattr(module, "_load", lambda name: refuse if name == "dali" else load(name))
    with caplog.at_level(logging.INFO, logger="synpo_fast"):
        frames, info = decode_frames(clip, indices=[3])
    assert info.backend == "pyav" and read_barcode(frames[0].numpy()) == 3
    assert caplog.messages[-1] == "clip.mp4: falling back to pyav: holds yuv420p10le"
    with pytest.raises(BackendRefusal, match="10le"):
        decode_frames(clip, indices=[3], backend="dali")


def test_the_choice_is_logged_in_one_line(clip, caplog):
    with caplog.at_level(logging.INFO, logger="synpo_fast"):
        decode_frames(clip, indices=[0])
    assert caplog.messages == ["clip.mp4: pyav, H.264 on a CPU"]
