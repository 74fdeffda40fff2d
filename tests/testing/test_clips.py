"""Writing a clip leaves the process that writes it as it was."""

import os

import pytest

from synpo_fast.testing.clips import ENCODERS, write_clip


@pytest.mark.parametrize("codec", ENCODERS)
def test_writing_a_clip_leaves_the_scheduling_alone(tmp_path, codec):
    """SVT-AV1 makes a process of root's a real-time one: a browser that a later test started held all processors for minutes."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    suffix = {"vp8": "webm", "vp9": "webm", "mjpeg": "avi"}.get(codec, "mp4")
    write_clip(tmp_path / f"a.{suffix}", codec=codec, num_frames=3, width=64, height=48, fps=8)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before
