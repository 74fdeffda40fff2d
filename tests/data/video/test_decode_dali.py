"""DALI on the CPU beside PyAV: the same frames, the same errors, and a process that lives on."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.testing.clips import draw_frame, read_barcode, write_clip, write_sound

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from synpo_fast.data.video import decode_dali

CPU = torch.device("cpu")
WANTED = [7, 0, 19, 7, 8, 12]
# a group of pictures of 7: frames on both sides of a keyframe
CLIPS = {
    "vp9-even": ("vp9", "clip.webm", 320, 240),
    "vp9-odd": ("vp9", "clip.mp4", 163, 121),
    "vp9-odd-height": ("vp9", "clip.mkv", 162, 121),
    "vp8-odd": ("vp8", "clip.webm", 65, 67),
    "mjpeg-even": ("mjpeg", "clip.avi", 320, 240),
    "mjpeg-odd": ("mjpeg", "clip.mov", 161, 99),
}


def psnr(one, other) -> float:
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def with_full_chroma(path: Path) -> np.ndarray:
    """All frames by PyAV, converted exactly; PyAV's default repeats chroma pixels on even sizes."""
    import av
    from av.video.reformatter import Interpolation

    how = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24", interpolation=how) for f in container.decode(video=0)])


def barcodes(frames: torch.Tensor) -> list[int]:
    return [read_barcode(frame) for frame in frames.numpy()]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_pyavs(tmp_path, name):
    codec, file, width, height = CLIPS[name]
    path = write_clip(tmp_path / file, codec=codec, num_frames=20, width=width, height=height, keyframe_every=7)
    frames, info = decode_frames(path, indices=WANTED, backend="dali")
    assert barcodes(frames) == WANTED and info.backend == "dali"
    assert psnr(frames, with_full_chroma(path)[WANTED]) > 50
    by_pyav, _ = decode_frames(path, indices=WANTED, backend="pyav")
    assert psnr(frames, by_pyav) > 50


@pytest.mark.parametrize("matrix", ["bt709", "bt2020nc", "smpte240m", "smpte170m"])
def test_colours_follow_the_matrix_of_the_video(tmp_path, matrix):
    options = {"colorspace": matrix, "crf": "10", "b": "0"}
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=3, width=160, height=120, options=options)
    frames, _ = decode_frames(path, backend="dali")
    assert psnr(frames, with_full_chroma(path)) > 50


def test_correction_of_primary_colours():
    """Y, Cb, Cr of pure colours, full range, by the definitions of the two standards."""
    colours = torch.eye(3)
    red, blue = 0.2126, 0.0722
    luma = colours @ torch.tensor([red, 1 - red - blue, blue])
    cb, cr = (colours[:, 2] - luma) / (2 * (1 - blue)), (colours[:, 0] - luma) / (2 * (1 - red))
    by_601 = torch.stack([luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb], -1)
    torch.testing.assert_close(by_601 @ decode_dali.colour_correction((red, blue)), colours, atol=1e-5, rtol=0)


def test_variable_frame_rate_is_by_index(tmp_path):
    times = [0, 0.04, 0.5, 0.52, 1.4, 1.44, 3.0, 3.04]
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=8, width=64, height=64, times=times)
    frames, _ = decode_frames(path, times=[0.6, 3.05, 0.1], backend="dali")
    assert barcodes(frames) == [3, 7, 1]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_upright(tmp_path, rotation):
    path = write_clip(tmp_path / "clip.mov", codec="mjpeg", num_frames=4, width=98, height=64, rotation=rotation)
    frames, info = decode_frames(path, indices=[3, 1], backend="dali")
    assert barcodes(frames) == [3, 1] and (info.width, info.height) == (98, 64)
    assert frames.is_contiguous()
    assert psnr(frames[0], draw_frame(3, 98, 64)) > 25


def test_audio_beside_the_video(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=12, width=64, height=64, audio=True)
    assert barcodes(decode_frames(path, indices=[11, 4], backend="dali")[0]) == [11, 4]


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.webm"
    if kind == "audio":
        return write_sound(path)
    path.write_bytes({"text": b"no video " * 99, "empty": b"", "zeros": bytes(99), "broken": broken_clip(folder)}[kind])
    return path


def broken_clip(folder: Path) -> bytes:
    """A clip of 20 frames whose packet 10 is zeros."""
    import av

    whole = write_clip(folder / "whole.webm", codec="vp9", num_frames=20, width=64, height=64)
    with av.open(str(whole)) as container:
        packet = bytes([p for p in container.demux(video=0) if p.size][10])
    return whole.read_bytes().replace(packet, bytes(len(packet)))


@pytest.mark.parametrize("kind", ["text", "empty", "zeros", "audio", "broken"])
def test_bad_files_are_named_and_the_next_decode_works(tmp_path, kind):
    good = write_clip(tmp_path / "good.webm", codec="vp9", num_frames=6, width=64, height=64)
    path = bad_file(kind, tmp_path)
    info = replace(probe_video(good), path=str(path), num_frames=20)
    with pytest.raises(VideoError, match=path.name):
        decode_dali.decode(path, info, [0, 19], device=CPU, deadline=time.monotonic() + 10)
    assert barcodes(decode_frames(good, indices=[5, 0], backend="dali")[0]) == [5, 0]


def test_a_short_file_is_an_error(tmp_path):
    """A webm cut in half plays its first half. Its header, and a caller who looked before the cut, promise all of it."""
    whole = write_clip(tmp_path / "whole.webm", codec="vp9", num_frames=40, width=64, height=64)
    info = probe_video(whole)
    cut = tmp_path / "cut.webm"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(VideoError, match=r"cut\.webm: has \d+ packets for 40 frames"):
        decode_dali.decode(cut, info, [0, 1], device=CPU, deadline=time.monotonic() + 10)
    left = probe_video(cut).num_frames
    assert 0 < left < 40
    assert barcodes(decode_frames(cut, indices=[left - 1], backend="dali")[0]) == [left - 1]
    with pytest.raises(VideoError, match=f"no frame {left}"):
        decode_frames(cut, indices=[left], backend="dali")


def test_dali_itself_refuses_a_frame_that_is_not_there(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=6, width=64, height=64)
    with pytest.raises(VideoError, match="out-of-bounds frame index 6"):
        decode_dali.decode(path, probe_video(path), [0, 6], device=CPU, deadline=time.monotonic() + 10)


def test_hidden_packets_are_refused(tmp_path):
    """DALI takes every packet for a frame; where one is never shown it returned the neighbours, and unwritten memory."""
    import av

    path = write_clip(tmp_path / "clip.webm", codec="vp8", num_frames=12, width=64, height=64)
    hidden = tmp_path / "hidden.webm"
    with av.open(str(path)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            if number == 5:
                data[0] &= ~0x10  # show_frame
            copy = av.Packet(bytes(data))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.is_keyframe, copy.stream = packet.is_keyframe, stream
            target.mux(copy)
    with pytest.raises(VideoError, match=r"12 packets for 11 frames.*pyav"):
        decode_frames(hidden, indices=[6], backend="dali")


def test_codecs_that_need_a_gpu_name_another_backend(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", codec="h264", num_frames=3, width=64, height=64)
    with pytest.raises(VideoError, match="vp8, vp9, mjpeg on cpu, not h264; choose pyav or auto as backend"):
        decode_frames(path, indices=[0], backend="dali")


def test_a_passed_deadline(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=3, width=64, height=64)
    with pytest.raises(VideoError, match="took too long"):
        decode_dali.decode(path, probe_video(path), [0], device=CPU, deadline=time.monotonic() - 1)


def test_frames_are_not_overwritten_by_the_next_decode(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=9, width=64, height=64)
    info = probe_video(path)
    kept = [decode_frames(path, indices=[k], backend="dali", info=info)[0] for k in range(9)]
    assert [barcodes(frames)[0] for frames in kept] == list(range(9))


def test_threads_share_the_pipeline(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=20, width=64, height=64)
    info, seen = probe_video(path), []

    def work(offset: int) -> None:
        for index in range(offset, 20, 4):
            seen.append((index, *barcodes(decode_frames(path, indices=[index], backend="dali", info=info)[0])))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(index, index) for index in range(20)]


FORK = """
import os, sys
from synpo_fast.testing.clips import read_barcode
from synpo_fast.data.video.decode import decode_frames
def number():
    return read_barcode(decode_frames(sys.argv[1], indices=[2], backend="dali")[0][0].numpy())
assert number() == 2
child = os.fork()
if child == 0:
    os._exit(0 if number() == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
assert number() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_decodes_too(tmp_path):
    path = write_clip(tmp_path / "clip.webm", codec="vp9", num_frames=3, width=64, height=64)
    root = Path(__file__).resolve().parents[3]
    subprocess.run([sys.executable, "-c", FORK, str(path)], cwd=root, check=True, timeout=60)


def test_memory_over_200_videos(tmp_path):
    psutil = pytest.importorskip("psutil", reason="memory is read through psutil")
    sizes = [(64, 64), (163, 121), (320, 240)]
    paths = [
        write_clip(tmp_path / f"{w}.webm", codec="vp9", num_frames=12, width=w, height=h, pixel="barcode")
        for w, h in sizes
    ]
    infos = [probe_video(path) for path in paths]
    process, resident = psutil.Process(), []
    for turn in range(200):
        decode_frames(paths[turn % 3], indices=range(0, 12, 2), backend="dali", info=infos[turn % 3])
        resident.append(process.memory_info().rss)
    assert max(resident[150:]) - max(resident[50:100]) < 8 * 2**20, "about 0.8 MB of frames a video"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NVDEC needs a CUDA device")
@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
@pytest.mark.parametrize(("width", "height"), [(320, 240), (322, 242)])
def test_nvdec_returns_pyavs_frames_on_the_device(tmp_path, codec, width, height):
    path = write_clip(
        tmp_path / "clip.mkv", codec=codec, num_frames=40, width=width, height=height, keyframe_every=15, b_frames=2
    )
    wanted = [39, 0, 14, 15, 14]
    frames, info = decode_frames(path, indices=wanted, backend="dali", device="cuda")
    assert frames.is_cuda and info.backend == "dali"
    assert barcodes(frames.cpu()) == wanted
    assert psnr(frames.cpu(), with_full_chroma(path)[wanted]) > 38
