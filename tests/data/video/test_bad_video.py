"""Paths and files that are no videos, or lie about what they hold: a named error or the right frames, never a hang."""

import os
import socket
import struct

import numpy as np
import pytest

from synpo_fast.data.video import container, probe
from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.data.video.video_path import resolve_video
from synpo_fast.testing.clips import read_barcode, write_clip, write_sound

SMALL = {"num_frames": 30, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        suffix: write_clip(folder / f"good{suffix}", codec=codec, keyframe_every=10, **SMALL)
        for codec, suffix in (("h264", ".mp4"), ("h264", ".mkv"), ("vp9", ".webm"), ("mjpeg", ".avi"))
    }


def barcodes(frames):
    return [read_barcode(frame.numpy()) for frame in frames]


def test_a_path_may_not_leave_its_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "sub").mkdir()
    for place in (root / "in.mp4", root / "sub" / "deep.mp4", tmp_path / "out.mp4"):
        place.write_bytes(b"x")
    (root / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (root / "folder").symlink_to(tmp_path)
    (root / "inner.mp4").symlink_to(root / "in.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    assert resolve_video("in.mp4", root) == resolve_video("inner.mp4", root) == (root / "in.mp4").resolve()
    assert resolve_video(root / "sub" / "deep.mp4", root).name == "deep.mp4", "absolute, but inside"
    for path, message in [
        ("../out.mp4", r"contains '\.\.'"),
        ("sub/../in.mp4", r"contains '\.\.'"),
        (tmp_path / "out.mp4", "is an absolute path to .*out.mp4, outside the root"),
        ("link.mp4", "follows a link to .*out.mp4, outside the root"),
        ("folder/out.mp4", "follows a link to"),
        ("loop.mp4", "cannot be reached|no such file"),
        ("missing.mp4", "missing.mp4: there is no such file under"),
        ("in.mp4/deeper.mp4", "cannot be reached"),
        ("", "is not a file name"),
        ("a\0b.mp4", "is not a file name"),
        ("x" * 5000, "cannot be reached"),
    ]:
        with pytest.raises(VideoError, match=message):
            resolve_video(path, root)


def test_pipes_sockets_devices_and_folders_are_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.mp4"))
        for path, message in [
            (tmp_path / "pipe.mp4", r"pipe.mp4: is a pipe, not a file"),
            (tmp_path / "socket.mp4", "is a socket, not a file"),
            ("/dev/zero", "is a device, not a file"),
            (tmp_path / "folder.mp4", "is a folder without images"),
        ]:
            with pytest.raises(VideoError, match=message):
                decode_frames(path, indices=[0])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm", ".txt"])
@pytest.mark.parametrize(
    "content", [b"", b"\0" * 5000, b"just some text\n" * 400, os.urandom(4000)], ids=["empty", "zeros", "text", "noise"]
)
def test_what_is_no_video_is_an_error(tmp_path, suffix, content):
    file = tmp_path / f"no_video{suffix}"
    file.write_bytes(content)
    reason = "cannot be decoded|has no video" if content else r"is empty \(0 bytes\)"
    with pytest.raises(VideoError, match=rf"no_video{suffix}: ({reason})"):
        decode_frames(file, indices=[0])


def test_a_playlist_does_not_lead_to_other_files(tmp_path, clips):
    """FFmpeg would follow these: to any file, and to any host."""
    good = clips[".mp4"]
    lists = {
        "concat.mp4": f"ffconcat version 1.0\nfile {good}\n",
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\n{good}\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(VideoError, match=f"{name}: cannot be decoded"):
            decode_frames(tmp_path / name, indices=[0])


@pytest.mark.parametrize(
    "name", ["concat:good.mp4|good.mp4", "file:good.mp4", "http:x.mp4", "%03d.mp4", "fr ünï.mp4", "-i.mp4"]
)
def test_names_are_names_not_addresses(tmp_path, clips, name, monkeypatch):
    (tmp_path / name).write_bytes(clips[".mp4"].read_bytes())
    monkeypatch.chdir(tmp_path)
    assert barcodes(decode_frames(name, indices=[7])[0]) == [7]
    assert barcodes(decode_frames(name, indices=[7], root=".")[0]) == [7]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_a_cut_file_gives_an_error_or_frames_that_are_right(tmp_path, clips, suffix, share):
    content = clips[suffix].read_bytes()
    file = tmp_path / f"cut{suffix}"
    file.write_bytes(content[: int(share * len(content))])
    try:
        frames, info = decode_frames(file)
    except VideoError as error:
        assert f"cut{suffix}: " in str(error)
        assert ("is an MP4 without a complete index (moov), usually an incomplete download" in str(error)) == (
            suffix == ".mp4"
        )
        return
    assert suffix != ".mp4", "the index of an MP4 stands at its end"
    assert barcodes(frames) == list(range(info.num_frames)) and 0 < info.num_frames < 30
    with pytest.raises(VideoError, match=f"has no frame 29: it has {info.num_frames} frames"):
        decode_frames(file, indices=[29])


def patched(content: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    at = content.index(mark) + len(mark) + offset
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_header_of_ten_hours_on_three_frames_gives_three_frames(tmp_path, suffix):
    file = write_clip(tmp_path / f"long{suffix}", codec="h264", num_frames=3, width=64, height=48)
    content = file.read_bytes()
    if suffix == ".mp4":
        for box, offset in ((b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 20)):
            content = patched(content, box, offset, struct.pack(">I", 2**31 - 1))
    else:
        content = patched(content, b"\x44\x89\x88", 0, struct.pack(">d", 36_000_000.0))
    file.write_bytes(content)
    frames, info = decode_frames(file)
    assert barcodes(frames) == [0, 1, 2] and info.num_frames == 3
    assert info.duration == pytest.approx(0.12, abs=0.01)
    with pytest.raises(VideoError, match="has no frame 100: it has 3 frames"):
        decode_frames(file, indices=[100])


@pytest.mark.parametrize(("codec", "suffix"), [("vp9", ".webm"), ("mjpeg", ".avi"), ("vp8", ".mkv")])
def test_one_pixel_is_a_video(tmp_path, codec, suffix):
    import av

    path = tmp_path / f"pixel{suffix}"
    encoder = {"vp9": "libvpx-vp9", "vp8": "libvpx", "mjpeg": "mjpeg"}[codec]
    with av.open(str(path), "w") as target:
        stream = target.add_stream(encoder, rate=25)
        stream.width = stream.height = 1
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for level in (40, 80, 120, 160, 200):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((1, 1, 3), level, np.uint8), format="rgb24")))
        target.mux(stream.encode())
    frames, info = decode_frames(path)
    assert tuple(frames.shape) == (5, 1, 1, 3) and info.num_frames == 5
    assert frames[:, 0, 0, 1].tolist() == pytest.approx([40, 80, 120, 160, 200], abs=12)


def test_sound_alone_is_no_video(tmp_path):
    for suffix in (".mp4", ".mkv", ".avi", ".webm"):
        with pytest.raises(VideoError, match=f"tone{suffix}: has no video stream"):
            decode_frames(write_sound(tmp_path / f"tone{suffix}"), indices=[0])


def test_a_frame_too_large_is_refused(clips, monkeypatch):
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 48 - 1)
    for path in clips.values():
        with pytest.raises(VideoError, match=r"pixels|cannot be decoded"):
            decode_frames(path, indices=[0])
    monkeypatch.setattr(container, "MAX_PIXELS", 64 * 48)
    assert barcodes(decode_frames(clips[".webm"], indices=[3])[0]) == [3]


def test_a_stream_that_grows_is_refused(tmp_path):
    """Two sizes one after another in one stream, as a damaged or hostile file has it."""
    import av

    file = tmp_path / "grows.mkv"
    small, large = (write_clip(tmp_path / f"{w}.webm", codec="vp8", num_frames=5, width=w, height=w) for w in (64, 256))
    with av.open(str(file), "w") as target:
        stream = None
        for part, path in enumerate((small, large)):
            with av.open(str(path)) as source:
                stream = stream or target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + 200 * part
                        packet.stream = stream
                        target.mux(packet)
    assert barcodes(decode_frames(file, indices=[4])[0]) == [4]
    with pytest.raises(VideoError, match="frame 7 is 256x256, the first is 64x64"):
        decode_frames(file, indices=[0, 7])


def test_too_many_packets_are_refused(clips, monkeypatch):
    monkeypatch.setattr(probe, "MAX_FRAMES", 29)
    with pytest.raises(VideoError, match="more than 29 packets"):
        probe_video(clips[".mkv"])


def test_a_video_that_shrank_since_it_was_probed_is_an_error(tmp_path, clips):
    """The index promises frames that decoding does not bring."""
    info = probe_video(clips[".mkv"])
    file = tmp_path / "shrunk.mkv"
    content = clips[".mkv"].read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=r"shrunk.mkv: (1 of 2 frames cannot be decoded, the first of them 29|cannot)"):
        decode_frames(file, indices=[0, 29], info=info)
