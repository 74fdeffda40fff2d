"""Every frame by its barcode, and against a plain decode of the whole file by PyAV, converted exactly."""

import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.data.video.decode import decode_frames, probe_video
from synpo_fast.data.video.decode_pyav import REORDER, Run, plan_runs
from synpo_fast.data.video.probe import _vp9_hidden
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.testing.clips import read_barcode, write_clip, write_sound

UNEVEN = [0.04 * frame + (0.03 if frame % 3 else 0.0) + (2.0 if frame > 30 else 0.0) for frame in range(60)]
OPEN_GOP = {"x264-params": "keyint=12:open-gop=1:b-pyramid=2:scenecut=0:bframes=3"}
OPEN_GOP_HEVC = {"x265-params": "log-level=none:keyint=12:open-gop=1:bframes=4:scenecut=0:pools=none"}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:keyint=12:scenecut=0"}

CLIPS = [
    ("h264", ".mp4", {"b_frames": 3, "keyframe_every": 20}),
    ("h264", ".mp4", {"b_frames": 3, "options": OPEN_GOP}),  # B-frames on both sides of a keyframe
    ("h264", ".mp4", {"options": INTRA_REFRESH}),  # a "keyframe" that becomes a whole picture only later
    ("h264", ".mkv", {"b_frames": 2, "keyframe_every": 12, "audio": True}),
    ("h264", ".mp4", {"b_frames": 2, "keyframe_every": 12, "times": UNEVEN}),
    ("h264", ".mov", {"keyframe_every": 1}),  # every frame is a keyframe, by no promise of the codec
    ("h264", ".avi", {"b_frames": 2}),  # AVI has no presentation times
    ("h264", ".ts", {"b_frames": 2}),
    ("h264", ".mp4", {"rotation": 90, "b_frames": 2}),
    ("h264", ".mkv", {"rotation": 270, "width": 98, "height": 76}),
    ("h264", ".mp4", {"width": 97, "height": 75}),  # odd in both
    ("h264", ".mp4", {"pixel_format": "yuv422p10le"}),
    ("hevc", ".mp4", {"b_frames": 3, "keyframe_every": 20}),
    ("hevc", ".mkv", {"b_frames": 4, "options": OPEN_GOP_HEVC, "pixel_format": "yuv420p10le"}),
    ("hevc", ".mov", {"rotation": 180}),
    ("vp8", ".webm", {"keyframe_every": 20}),
    ("vp9", ".webm", {"keyframe_every": 20}),
    ("vp9", ".webm", {"times": UNEVEN, "keyframe_every": 12}),
    ("vp9", ".webm", {"width": 97, "height": 75, "pixel_format": "yuv444p"}),
    ("av1", ".mp4", {"keyframe_every": 20}),
    ("av1", ".webm", {"times": UNEVEN}),
    ("mjpeg", ".avi", {"audio": True}),
    ("mjpeg", ".mov", {"width": 97, "height": 75}),
    ("mpeg4", ".avi", {"b_frames": 2}),
    ("mpeg4", ".mp4", {"b_frames": 2}),
]


def name(clip):
    codec, suffix, options = clip
    return "-".join([codec + suffix, *(f"{key}" for key in options)])


def write(folder, clip, num_frames=60):
    codec, suffix, options = clip
    size = {"width": 96, "height": 64} | options
    return write_clip(folder / f"clip{suffix}", codec=codec, num_frames=num_frames, **size)


def plain_decode(path):
    exact = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    with av.open(str(path)) as container:
        return [
            np.rot90(f.to_ndarray(format="rgb24", interpolation=exact), f.rotation // 90)
            for f in container.decode(video=0)
        ]


def same_pictures(frames, truth):
    """Up to rounding, which moves few values by one level; another frame, or chroma half a pixel off, moves many."""
    error = np.abs(frames.numpy().astype(int) - truth)
    return error.max() <= 1 and error.mean() < 0.05


@pytest.mark.parametrize("clip", CLIPS, ids=name)
def test_every_index_is_right_and_every_pixel_that_of_a_plain_decode(clip, tmp_path, caplog):
    path = write(tmp_path, clip)
    truth = np.stack(plain_decode(path))
    info = probe_video(path)
    assert info.num_frames == len(truth) == 60
    assert (info.height, info.width) == truth.shape[1:3] and info.rotation == clip[2].get("rotation", 0)
    frames, _ = decode_frames(path, info=info)
    assert [read_barcode(frame.numpy()) for frame in frames] == list(range(60))
    assert same_pictures(frames, truth)
    whole = frames.numpy()
    rng = random.Random(0)
    for count in (1, 1, 1, 2, 3, 5, 9, 30):
        indices = [rng.randrange(60) for _ in range(count)]
        for known in (info, None):  # the file opened for this, or read to its end before
            frames, _ = decode_frames(path, indices=indices, info=known)
            assert np.array_equal(frames.numpy(), whole[indices]), indices
    slow = "decoding" in caplog.text and "from the start of the file" in caplog.text
    assert slow == (clip[2].get("options") == INTRA_REFRESH), "keyframes suffice, but where they are none"


@pytest.mark.parametrize("clip", [CLIPS[0], CLIPS[4], CLIPS[13], CLIPS[15], CLIPS[17], CLIPS[19], CLIPS[23]], ids=name)
def test_times_are_those_written(clip, tmp_path):
    info = probe_video(write(tmp_path, clip))
    written = clip[2].get("times") or [frame / 25 for frame in range(60)]
    assert info.timestamps == pytest.approx(written, abs=6e-4), "Matroska has milliseconds"
    assert info.duration == pytest.approx(written[-1] + 0.04, abs=0.035), (
        "what the last frame's time is, is the muxer's"
    )


@pytest.mark.parametrize("clip", [CLIPS[0], CLIPS[6], CLIPS[12], CLIPS[16], CLIPS[19], CLIPS[21]], ids=name)
def test_one_frame_is_a_video(clip, tmp_path):
    path = write(tmp_path, clip, num_frames=1)
    frames, info = decode_frames(path)
    assert [read_barcode(frame.numpy()) for frame in frames] == [0]
    assert info.num_frames == 1 and info.timestamps == (0.0,) and 0 < info.duration <= 0.5


def test_the_last_frame_lasts_as_long_as_its_packet_says(tmp_path):
    times = [0.0, 0.1, 0.2, 0.3, 1.3]
    path = write_clip(tmp_path / "c.mp4", codec="h264", num_frames=5, width=64, height=48, times=times)
    with av.open(str(path)) as container:
        last = [float(packet.duration * packet.time_base) for packet in container.demux(video=0) if packet.size][-1]
    assert last != pytest.approx(0.1), "not the usual time between two, or this shows nothing"
    assert probe_video(path).duration == pytest.approx(1.3 + last)


def remuxed(source_path, target_path, change):
    """change(place, packet) -> [(time stamp, content), ...] to write in its place."""
    with av.open(str(source_path)) as source, av.open(str(target_path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for place, packet in enumerate(packets):
            for stamp, content in change(place, packet):
                written = av.Packet(content)
                written.pts = written.dts = stamp
                written.time_base, written.is_keyframe, written.stream = packet.time_base, packet.is_keyframe, stream
                target.mux(written)
    return target_path


def test_hidden_vp8_pictures_are_no_frames(tmp_path):
    """Two pictures lose their show bit: they are decoded, referred to and never seen."""
    path = write_clip(tmp_path / "a.webm", codec="vp8", num_frames=30, width=64, height=48, keyframe_every=10)

    def hide(place, packet):
        content = bytearray(bytes(packet))
        if place in (7, 22):
            content[0] &= ~0x10
        return [(packet.pts, bytes(content))]

    hidden = remuxed(path, tmp_path / "b.webm", hide)
    frames, info = decode_frames(hidden)
    left = [index for index in range(30) if index not in (7, 22)]
    assert info.num_frames == 28 and [read_barcode(frame.numpy()) for frame in frames] == left
    assert read_barcode(decode_frames(hidden, indices=[22])[0][0].numpy()) == left[22]


@pytest.mark.parametrize(
    ("first", "last", "hidden"),
    [
        (0b10_00_0_1_1_0, 0, False),  # marker 2, profile 0, no repeat, inter, shown
        (0b10_00_0_1_0_0, 0, True),
        (0b10_00_1_000, 0, False),  # shows an earlier picture again
        (0b10_01_0_1_0_0, 0, True),  # profile 2: the low bit comes first
        (0b10_11_0_0_1_1, 0, False),  # profile 3 has a reserved bit, so all that follows stands one further
        (0b10_11_0_0_1_0, 0, True),
        (0b10_00_0_1_0_0, 0b110_00_001, False),  # hidden and shown pictures in one packet
    ],
)
def test_hidden_vp9_pictures_by_their_header(first, last, hidden):
    """By the bits of the specification's uncompressed_header: the encoder at hand makes none in one pass."""
    assert _vp9_hidden(av.Packet(bytes([first, 0, 0, last]))) == hidden


def test_keyframes_are_where_they_were_put(tmp_path):
    assert probe_video(write(tmp_path, CLIPS[0])).keyframes == (0, 20, 40)
    assert probe_video(write(tmp_path, CLIPS[21])).keyframes == tuple(range(60))


def test_few_frames_of_a_long_clip_decode_few_pictures(tmp_path, monkeypatch):
    """The keyframe and its frame: not the GOP's rest, not what lies between, not the clip's end."""
    path = write_clip(
        tmp_path / "c.mp4", codec="h264", num_frames=400, width=64, height=48, keyframe_every=40, b_frames=2
    )
    from synpo_fast.data.video import decode_pyav

    decoded = []

    def pictures(*args):
        for picture in real(*args):
            decoded.append(picture.pts)
            yield picture

    real, looks = decode_pyav._pictures, []
    monkeypatch.setattr(decode_pyav, "_pictures", pictures)
    monkeypatch.setattr(decode_pyav, "check_deadline", lambda *args: looks.append(args))  # once a packet
    frames, _ = decode_frames(path, indices=[40, 205, 361])
    assert [read_barcode(frame.numpy()) for frame in frames] == [40, 205, 361]
    assert len(decoded) <= 1 + 6 + 2, "1, 6 and 2 pictures from the keyframe to the frame, B-frames included"
    assert len(looks) <= 20, "and of 400 packets few are read"


keyframe_sets = st.lists(st.integers(1, 300), unique=True, max_size=12).map(lambda keys: (0, *sorted(keys)))


@given(st.lists(st.integers(0, 300), unique=True, min_size=1).map(sorted), keyframe_sets, st.booleans())
def test_runs_cover_what_is_wanted_from_keyframes_before_it(wanted, keyframes, intra):
    runs = plan_runs(wanted, keyframes, every_frame_is_key=intra)
    assert [index for run in runs for index in run.wanted] == wanted
    for run in runs:
        assert run.start in keyframes and run.start <= run.wanted[0]
        assert not any(run.start < key <= run.wanted[0] for key in keyframes), "the nearest keyframe"
    for before, after in pairwise(runs):
        assert after.start > before.wanted[-1] + REORDER, "its packet cannot have been passed yet"


def test_frames_before_the_first_keyframe_are_decoded_from_the_start():
    assert plan_runs([1, 4, 50], (3, 30)) == [Run(None, (1, 4)), Run(30, (50,))]


def test_leading_frames_that_refer_to_a_cut_part_are_no_frames(tmp_path):
    """An open GOP cut at its keyframe: the packets of B-frames shown before that keyframe are there, but of no use."""
    whole = write_clip(tmp_path / "whole.mkv", codec="hevc", num_frames=60, width=96, height=64, options=OPEN_GOP_HEVC)
    cut = tmp_path / "cut.mkv"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        keyframes = num_packets = 0
        for packet in source.demux(video=0):
            keyframes += packet.is_keyframe
            if keyframes >= 2 and packet.size:
                packet.stream = stream
                target.mux(packet)
                num_packets += 1
    truth = np.stack(plain_decode(cut))
    frames, info = decode_frames(cut)
    assert info.num_frames == len(truth) < num_packets
    assert same_pictures(frames, truth)


@pytest.mark.parametrize("first", [1, 5, 19, 20, 33])
def test_an_edit_list_hides_frames_that_are_still_decoded(tmp_path, first):
    """The container starts in the middle of a GOP: what stands before is needed to decode and never shown."""
    path = write(tmp_path, CLIPS[0])
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12  # version, flags and count, then duration and media time
    media_time = int.from_bytes(content[entry + 4 : entry + 8], "big")
    content[entry + 4 : entry + 8] = (media_time + 512 * first).to_bytes(4, "big")
    path.write_bytes(content)
    truth = np.stack(plain_decode(path))
    assert read_barcode(truth[0]) == first and len(truth) == 60 - first
    frames, info = decode_frames(path)
    assert info.num_frames == len(truth) and same_pictures(frames, truth)
    for indices in ([0], [3, 1], [len(truth) - 1], [20, 0, 21]):
        assert same_pictures(decode_frames(path, indices=indices, info=info)[0], truth[indices])
    assert info.timestamps[0] == 0 and info.timestamps[1] == pytest.approx(0.04)


def test_an_edit_list_that_ends_early_hides_the_end(tmp_path):
    path = write(tmp_path, CLIPS[0])
    content = bytearray(path.read_bytes())
    entry = content.index(b"elst") + 12
    content[entry : entry + 4] = (1000).to_bytes(4, "big")  # of 2400 milliseconds
    path.write_bytes(content)
    truth = np.stack(plain_decode(path))
    frames, info = decode_frames(path)
    assert info.num_frames == len(truth) == 25 and same_pictures(frames, truth)


def test_a_keyframe_flag_that_lies_costs_time_but_no_frame(tmp_path, caplog):
    """An index that names a frame as a keyframe which refers to others: decoding cannot begin there."""
    path = write(tmp_path, ("h264", ".mp4", {"keyframe_every": 60}))
    truth = np.stack(plain_decode(path))
    info = replace(probe_video(path), keyframes=(0, 40))
    for indices in ([50], [3, 45], [40], [59, 0]):
        frames, _ = decode_frames(path, indices=indices, info=info)
        assert same_pictures(frames, truth[indices])
    assert "decoding 1 frames from the start of the file" in caplog.text


@pytest.mark.heavy
def test_memory_follows_the_frames_asked_for(tmp_path):
    """20 minutes at 64x48 are 264 MiB of frames; 15 of them are nothing. In a process of its own: the peak only rises."""
    size = {"num_frames": 30_000, "width": 64, "height": 48, "pixel": "barcode"}
    path = write_clip(tmp_path / "long.mp4", codec="h264", keyframe_every=50, **size)
    code = f"""if True:
        import resource
        from synpo_fast.data.video.decode import decode_frames
        decode_frames({str(path)!r}, indices=[0, 1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        frames, info = decode_frames({str(path)!r}, indices=range(0, 30_000, 2_000))
        print(info.num_frames, len(frames), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    num_frames, count, grown_kib = map(int, done.stdout.split())
    assert (num_frames, count) == (30_000, 15) and grown_kib < 20 * 1024


def test_sound_alone_is_no_video(tmp_path):
    with pytest.raises(VideoError, match=r"tone.mp4: has no video stream"):
        probe_video(write_sound(tmp_path / "tone.mp4"))
