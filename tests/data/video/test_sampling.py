"""Chosen frames against the authors' rule written out, and against time counted by hand where the rate varies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.data.video.sampling import (
    FrameSampling,
    constant_rate,
    part_frames,
    seconds_per_frame,
    share_out,
    uniform,
)
from synpo_fast.data.video.video_info import VideoError, VideoInfo


def video(times, last=None) -> VideoInfo:
    times = tuple(times)
    last = (times[-1] / (len(times) - 1) if len(times) > 1 else 0.04) if last is None else last
    return VideoInfo("clip.mp4", "h264", 64, 48, len(times), times[-1] + last, times)


def steady(num_frames, fps) -> VideoInfo:
    return video([frame / fps for frame in range(num_frames)], 1 / fps)


steady_videos = st.builds(steady, st.integers(1, 5000), st.sampled_from([1, 10, 23.976, 24, 25, 29.97, 30, 60, 120]))
uneven_videos = st.lists(st.floats(0.001, 5.0), min_size=1, max_size=80).map(lambda gaps: video(np.cumsum([0, *gaps])))


def authors_rule(info, fps, low, high):
    n = max(min(int(round(info.duration * fps, 6)), high), low)  # rounded: the sum of many 1/30 may miss a whole second
    return np.linspace(0, info.num_frames - 1, min(n, info.num_frames)).astype(int).tolist()


@given(steady_videos, st.sampled_from([0.1, 0.5, 1, 2, 5]), st.integers(1, 16), st.integers(0, 64))
def test_a_constant_rate_follows_the_authors_rule(info, fps, low, more):
    got = FrameSampling(fps=fps, min_frames=low, max_frames=low + more).indices(info)
    assert got == authors_rule(info, fps, low, low + more)


@pytest.mark.parametrize(("seconds", "wanted"), [(3, 8), (16, 8), (20, 10), (31.9, 15), (32, 16), (3600, 16)])
def test_the_released_setting(seconds, wanted):
    """n = clamp(int(duration * 0.5), 8, 16)."""
    info = steady(round(seconds * 10), 10)
    assert len(FrameSampling(fps=0.5, min_frames=8, max_frames=16).indices(info)) == wanted


@given(steady_videos | uneven_videos, st.integers(1, 100))
def test_n_frames_are_sorted_distinct_and_reach_both_ends(info, n):
    got = FrameSampling(num_frames=n).indices(info)
    assert len(got) == min(n, info.num_frames)
    assert got == sorted(set(got)) and got[0] == 0 and got[-1] < info.num_frames
    assert got[-1] == info.num_frames - 1 or len(got) == 1


@given(uneven_videos, st.integers(3, 20))
def test_an_uneven_rate_takes_the_frame_shown_at_even_moments(info, n):
    if constant_rate(info.timestamps) or n >= info.num_frames:
        return
    got = FrameSampling(num_frames=n).indices(info)
    moments = np.linspace(0, info.timestamps[-1], n)
    shown = [max(i for i, at in enumerate(info.timestamps) if at <= moment + 1e-6) for moment in moments]
    if len(set(shown)) == n:
        assert got == shown


def test_a_frame_shown_long_is_taken_once():
    info = video([0, 100, 100.1, 100.2, 100.3, 100.4], 0.1)
    assert FrameSampling(num_frames=4).indices(info) == [0, 1, 2, 5]
    slow_end = video([0, 0.1, 0.2, 0.3, 0.4, 100], 100)
    assert FrameSampling(num_frames=4).indices(slow_end) == [0, 3, 4, 5]


def test_counting_frames_would_be_wrong_at_an_uneven_rate():
    """10 frames in the first second, 1 a second for 10 more: the middle of the video is near its end in frames."""
    info = video([*np.arange(10) / 10, *range(1, 11)], 1.0)
    assert FrameSampling(num_frames=3).indices(info) == [0, 14, 19]
    assert uniform(20, 3) == [0, 9, 19]


def test_times_rounded_to_milliseconds_count_as_constant():
    assert constant_rate([round(frame / 60, 3) for frame in range(600)])
    assert not constant_rate([0, 1, 1.5, 3])


@given(steady_videos | uneven_videos, st.floats(0, 1), st.floats(0.01, 1), st.integers(1, 20))
def test_a_part_holds_the_frames_that_begin_in_it(info, at, length, n):
    start, end = at * info.duration * 0.98, min(info.duration, at * info.duration * 0.98 + length * info.duration)
    inside = [i for i, time in enumerate(info.timestamps) if start - 1e-6 <= time < end - 1e-6]
    got = FrameSampling(num_frames=n).indices(info, start, end)
    if inside:
        assert set(got) <= set(inside) and got[0] == inside[0] and len(got) == min(n, len(inside))
    else:
        assert got == [max(i for i, time in enumerate(info.timestamps) if time <= start)]


def test_a_part_and_its_count():
    info = steady(250, 25)
    assert part_frames(info, 2.0, 4.0) == range(50, 100)
    assert FrameSampling(fps=2).indices(info, 2.0, 4.0) == [50, 66, 82, 99]
    assert FrameSampling(fps=2).indices(info, 9.0, 100.0) == [225, 249], "an end past the video is the video's end"
    for start, end in [(10.0, None), (5.0, 5.0), (4.0, 2.0), (-1.0, 2.0), (float("nan"), 1.0)]:
        with pytest.raises(VideoError, match=r"clip.mp4: has no part from"):
            FrameSampling(num_frames=2).indices(info, start, end)


def test_clips_share_the_frames_by_duration():
    long, short = steady(1000, 25), steady(10, 25)
    parts = [(long, None, None), (short, None, None), (long, 10.0, 20.0)]
    got = FrameSampling(num_frames=16).clip_indices(parts)
    assert [len(part) for part in got] == [12, 1, 3]
    assert got[2] == [250, 374, 499]
    assert [len(part) for part in FrameSampling(num_frames=3).clip_indices(parts)] == [1, 1, 1]
    assert [len(part) for part in FrameSampling(num_frames=5000).clip_indices(parts)] == [1000, 10, 250]
    with pytest.raises(ValueError, match="3 clips need one frame each, but only 2 are to be taken"):
        FrameSampling(num_frames=2).clip_indices(parts)
    with pytest.raises(ValueError, match="no clips"):
        FrameSampling(num_frames=2).clip_indices([])


@given(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50)), min_size=1, max_size=10), st.data())
def test_shares_add_up_and_fit(takers, data):
    weights, room = [weight for weight, _ in takers], [places for _, places in takers]
    total = data.draw(st.integers(len(takers), sum(room)))
    shares = share_out(total, weights, room)
    assert sum(shares) == total and all(1 <= share <= places for share, places in zip(shares, room, strict=True))


def test_seconds_per_frame_is_the_mean_gap():
    info = steady(100, 25)
    assert seconds_per_frame(info, [0, 50, 99]) == pytest.approx(99 / 25 / 2)
    assert seconds_per_frame(info, [7]) == info.duration
    uneven = video([0, 1, 5], 1)
    assert seconds_per_frame(uneven, [0, 2]) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "num_frames or fps"),
        ({"num_frames": 4, "fps": 1.0}, "got 4 and 1.0"),
        ({"num_frames": 0}, "must be positive, got 0"),
        ({"fps": 0.0}, "positive and finite, got 0.0"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": 1.0, "min_frames": 0}, "got 0 and None"),
        ({"fps": 1.0, "min_frames": 9, "max_frames": 8}, "got 9 and 8"),
        ({"num_frames": 4, "max_frames": 8}, "with num_frames, leave them out"),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FrameSampling(**settings)
