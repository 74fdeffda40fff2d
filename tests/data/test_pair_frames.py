"""The frames a pair shows: of one video, of a part, of several clips of different sizes."""

import pytest
import torch

from synpo_fast.data.pair import Clip, Pair
from synpo_fast.data.pair_frames import pair_frames
from synpo_fast.data.video.sampling import FrameSampling
from synpo_fast.data.video.video_info import VideoError
from synpo_fast.testing.clips import read_barcode, write_clip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_clip(root / "wide.mp4", codec="h264", num_frames=20, width=128, height=96, fps=10)
    write_clip(root / "other.mp4", codec="h264", num_frames=40, width=128, height=96, fps=10)
    write_clip(root / "tall.mp4", codec="h264", num_frames=10, width=64, height=130, fps=10)
    return root


def shown(root, num_frames, **fields):
    pair = Pair("q", "a", "b", id="p", **fields)
    frames, seconds = pair_frames(pair, FrameSampling(num_frames=num_frames), video_root=root)
    return frames, seconds


def numbers(frames) -> list[int]:
    return [read_barcode(frame.numpy()) for frame in frames]


def test_a_text_pair_shows_nothing_and_ready_frames_are_taken_as_they_are(root):
    assert shown(root, 2) == (None, None)
    ready = torch.zeros(3, 4, 5, 3, dtype=torch.uint8)
    frames, seconds = shown(root, 2, video=ready)
    assert frames is ready and seconds is None


def test_a_video(root):
    frames, seconds = shown(root, 3, video="wide.mp4")
    assert numbers(frames) == [0, 9, 19] and seconds == pytest.approx(0.95)
    frames, seconds = shown(root, 1, video=root / "wide.mp4")
    assert numbers(frames) == [0] and seconds == pytest.approx(2.0), "one frame stands for all of it"


def test_a_part_of_a_video(root):
    frames, seconds = shown(root, 4, clips=(Clip("other.mp4", 1.0, 2.0),))
    assert numbers(frames) == [10, 13, 16, 19] and seconds == pytest.approx(0.3)


def test_clips_follow_each_other_in_time(root):
    clips = (Clip("other.mp4", 2.0, 3.0), Clip("wide.mp4"), Clip("other.mp4", 0.0, 1.0))
    frames, seconds = shown(root, 8, clips=clips)
    assert numbers(frames) == [20, 29, 0, 6, 12, 19, 0, 9], "2 + 4 + 2: shared out by length"
    assert seconds == pytest.approx((3.9 - 0.0) / 7), "the last one stands at 1 + 2 + 0.9 seconds"


def test_a_clip_of_another_size_is_fitted_into_the_first(root):
    frames, _ = shown(root, 4, clips=(Clip("wide.mp4"), Clip("tall.mp4")))
    assert frames.shape[1:] == (96, 128, 3)
    assert numbers(frames[:3]) == [0, 9, 19]
    bars = torch.cat([frames[-1, :, :40], frames[-1, :, -40:]], 1)
    assert (bars == 0).all(), "64 x 130 scaled to 47 x 96, in the middle"
    tall, _ = shown(root, 1, video="tall.mp4")
    inside = frames[-1, :, 41:87].float()
    assert (inside.mean((0, 1)) - tall[0].float().mean((0, 1))).abs().max() < 3, "the same colours"


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"clips": (Clip("wide.mp4", 2.5),)}, VideoError, "wide.mp4: has no part from 2.5"),
        ({"clips": (Clip("wide.mp4"), Clip("missing.mp4"))}, VideoError, "missing.mp4"),
        ({"clips": (Clip("wide.mp4"),) * 3}, ValueError, "3 clips need one frame each"),
    ],
)
def test_what_can_not_be_shown_is_named(root, fields, error, message):
    with pytest.raises(error, match=message):
        shown(root, 2, **fields)


def test_the_deadline_is_for_all_of_it(root):
    pair = Pair("q", "a", "b", video="wide.mp4")
    with pytest.raises(VideoError):
        pair_frames(pair, FrameSampling(num_frames=2), video_root=root, deadline_s=-1.0)
