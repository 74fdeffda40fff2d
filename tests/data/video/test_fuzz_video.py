"""Bit flips in clips of every codec and container: VideoError or frames of the right shape, no crash, no hang."""

import pytest

from tests.data.video.fuzz import CLIPS, damage, fuzz, write_clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("fuzz"))


def test_damage_is_repeatable_and_real():
    content = bytes(range(256)) * 20
    assert damage(content, 7) == damage(content, 7) != damage(content, 8)
    assert sum(damage(content, seed) != content for seed in range(100)) > 95


def check(outcome, count):
    assert not outcome.faults, outcome.faults[:5]
    assert sum(outcome.counts.values()) == count and set(outcome.counts) == {"VideoError", "frames"}
    assert min(outcome.counts.values()) > count // 10, f"one-sided damage proves little: {outcome.counts}"


def test_300_damaged_clips(clips):
    check(fuzz(clips, range(300)), 300)


@pytest.mark.heavy
def test_10000_damaged_clips(clips):
    check(fuzz(clips, range(300, 10_300)), 10_000)


def test_a_crash_and_an_error_of_ours_are_seen(tmp_path):
    """The instrument itself: a worker that dies counts as a crash, and the others go on."""
    from tests.data.video import fuzz as module

    outcome = module.fuzz([tmp_path / "missing.mp4"], range(3), processes=1)
    assert outcome.counts == {"crash": 3} and len(outcome.faults) == 3
    assert len(CLIPS) == len({(codec, suffix, str(options)) for codec, suffix, options in CLIPS})
