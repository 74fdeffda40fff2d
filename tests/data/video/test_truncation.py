"""Files that end too early are told from whole ones, in both directions, over the kinds of clips that are read."""

import json
import struct

import av
import pytest

from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.pair_frames import pair_frames
from synpo_fast.data.video import truncation
from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.pairs.check import check_manifest
from synpo_fast.testing.clips import read_barcode, write_clip
from tests.data.video import test_decode_pyav as pyav

SIZE = {"width": 64, "height": 48}
LATE = [0.04 * place for place in range(99)] + [30.0]  # the last picture but one is shown for 26 s


def muxed(source_path, target_path, **options):
    """Writes the same packets into another container, or into the same one with other options."""
    with av.open(str(source_path)) as source, av.open(str(target_path), "w", **options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return target_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four seconds each, in every container that is read, and written in every way that has no end known beforehand."""
    folder = tmp_path_factory.mktemp("whole")
    many = {"num_frames": 100, "keyframe_every": 20, **SIZE}
    h264 = write_clip(folder / "h264.mp4", codec="h264", b_frames=2, **many)
    vp9 = write_clip(folder / "vp9.webm", codec="vp9", **many)
    return {
        "mp4": muxed(h264, folder / "start.mp4", options={"movflags": "faststart"}),
        "mp4 in fragments": muxed(h264, folder / "parts.mp4", options={"movflags": "frag_keyframe+empty_moov"}),
        "mov": muxed(h264, folder / "start.mov", options={"movflags": "faststart"}),
        "mkv": write_clip(folder / "a.mkv", codec="h264", audio=True, **many),
        "webm": write_clip(folder / "a.webm", codec="vp9", audio=True, **many),
        "live webm": muxed(vp9, folder / "live.webm", options={"live": "1"}, format="webm"),
        "avi": write_clip(folder / "a.avi", codec="mjpeg", audio=True, **many),
        "flv": muxed(h264, folder / "a.flv"),
        "ts": write_clip(folder / "a.ts", codec="h264", audio=True, **many),
        "mpeg4": write_clip(folder / "mpeg4.avi", codec="mpeg4", **many),
        "late": write_clip(folder / "late.webm", codec="vp9", times=LATE, **many),
        "late mp4": write_clip(folder / "late.mp4", codec="h264", times=LATE, **many),
    }  # fmt: skip


def cut(path, folder, share):
    content = path.read_bytes()
    file = folder / f"cut-{path.name}"
    file.write_bytes(content[: int(share * len(content))])
    return file


def test_whole_files_are_whole(whole):
    for name, path in whole.items():
        assert probe_video(path).cut_off == "", name


@pytest.mark.parametrize("clip", pyav.CLIPS, ids=pyav.name)
def test_every_kind_of_clip_is_whole(clip, tmp_path):
    assert probe_video(pyav.write(tmp_path, clip)).cut_off == ""


@pytest.mark.parametrize("first", [0, 5, 33])
@pytest.mark.parametrize("last", [None, 1000])
def test_what_an_edit_list_hides_is_not_missing(tmp_path, first, last):
    path = pyav.write(tmp_path, pyav.CLIPS[0])
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    media_time = int.from_bytes(content[entry + 4 : entry + 8], "big")
    content[entry + 4 : entry + 8] = (media_time + 512 * first).to_bytes(4, "big")
    if last:
        content[entry : entry + 4] = last.to_bytes(4, "big")
    path.write_bytes(content)
    assert (probe_video(path).cut_off == "" and probe_video(path).num_frames < 60) or not (first or last)


def test_sound_that_lasts_longer_is_no_cut(tmp_path):
    """The duration a container states is that of its longest stream."""
    path = write_clip(tmp_path / "v.mkv", codec="h264", num_frames=25, audio=True, **SIZE)
    longer = tmp_path / "longer.mkv"
    with av.open(str(path)) as source, av.open(str(longer), "w") as target:
        streams = {stream.index: target.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                kept = packet.stream_index == 1 or packet.pts * packet.time_base < 0.3
                if packet.stream_index == 1:
                    packet.pts = packet.dts = packet.pts * 10
                packet.stream = streams[packet.stream_index]
                if kept:
                    target.mux(packet)
    with av.open(str(longer)) as container:
        assert container.duration > 9_000_000
    info = probe_video(longer)
    assert info.cut_off == "" and info.duration < 0.5


@pytest.mark.parametrize("share", [0.97, 0.9, 0.6, 0.3])
@pytest.mark.parametrize("name", ["mp4", "mov", "mkv", "webm", "avi", "flv"])
def test_a_cut_is_seen_and_the_share_named(whole, tmp_path, name, share):
    file = cut(whole[name], tmp_path, share)
    info = probe_video(file)
    if info.num_frames == 100:  # an AVI's index stands at its end
        assert name == "avi" and share == 0.97 and info.cut_off == ""
        return
    there = info.num_frames / 100
    if name in ("mkv", "webm", "flv") and there > 0.76:
        assert info.cut_off == "", "within what a healthy file may lack"
        return
    assert info.cut_off.startswith("is cut off"), (name, share, there)
    told = int(info.cut_off.rsplit("(")[1].removesuffix("%)")) / 100
    assert told == pytest.approx(there, abs=0.05)
    frames, _ = decode_frames(file, indices=[0])
    assert read_barcode(frames[0].numpy()) == 0, "what is there can still be read"


def test_fragments_of_mp4(whole, tmp_path):
    """A cut shows wherever it lies inside a fragment; between two of them it cannot be detected."""
    content = whole["mp4 in fragments"].read_bytes()
    second, third = (place - 4 for place in _places(content, b"moof")[1:3])
    file = tmp_path / "cut.mp4"
    for length in (second + 3, second + 9, second + 100, third - 1):
        file.write_bytes(content[:length])
        info = probe_video(file)
        assert info.cut_off == "is cut off inside a fragment; the number of lost frames is unknown", length
        assert 20 <= info.num_frames < 40
    file.write_bytes(content[:third])
    assert probe_video(file).cut_off == "" and probe_video(file).num_frames == 40


def _places(content, name):
    return [place for place in range(len(content)) if content.startswith(name, place)]


def test_where_nothing_is_stated_nothing_is_claimed(whole, tmp_path):
    for name in ("ts", "live webm"):
        info = probe_video(cut(whole[name], tmp_path, 0.6))
        assert info.num_frames < 100 and info.cut_off == "", name


def test_the_slack_grows_with_the_duration(tmp_path):
    """A header of 100 s on 98.5 s is rounding, on 97.5 s it is a cut."""
    for seconds, is_cut in ((98.5, False), (97.5, True)):
        times = [0.5 * place for place in range(int(2 * seconds))]
        path = write_clip(tmp_path / "v.mkv", codec="mpeg4", num_frames=len(times), times=times, **SIZE)
        content = path.read_bytes()
        at = content.index(b"\x44\x89\x88") + 3
        path.write_bytes(content[:at] + struct.pack(">d", 100_000.0) + content[at + 8 :])
        assert bool(probe_video(path).cut_off) == is_cut
    assert truncation.SLACK_SHARE == 0.02


def test_check_finds_what_training_skips_and_clips_inside_are_used(whole, tmp_path):
    for name in ("mp4", "webm"):
        cut(whole[name], tmp_path, 0.5)
    rows = [
        {"prompt": f"q{n}", "chosen": "a", "rejected": "b", "video": f"cut-{whole[n].name}"} for n in ("mp4", "webm")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = check_manifest(tmp_path / "pairs.jsonl", video_root=tmp_path)
    (finding,) = report.findings
    assert finding.what == "videos that cannot be used" and not report.clean
    assert all(": is cut off: " in example and example.endswith("(1 pair)") for example in finding.examples)
    sampling = FrameSampling(num_frames=4)
    with pytest.raises(
        VideoError, match=r"cut-start.mp4: is cut off: .* of its 100 frames are there .*; download it again, or give"
    ):
        pair_frames(Pair("q", "a", "b", video="cut-start.mp4"), sampling, video_root=tmp_path)
    with pytest.raises(VideoError, match="is cut off"):
        pair_frames(Pair("q", "a", "b", clips=(Clip("cut-start.mp4", 0.5, 3.5),)), sampling, video_root=tmp_path)
    frames, _ = pair_frames(
        Pair("q", "a", "b", clips=(Clip("cut-start.mp4", 0.2, 1.0),)), sampling, video_root=tmp_path
    )
    assert read_barcode(frames[0].numpy()) == 5
