"""Every row gets a response that belongs to another video or prompt, chosen from the list of rows alone."""

import pytest

from synpo_fast.data.mismatched import with_mismatched
from synpo_fast.data.pair import Pair


def pair(name, context="", **more):
    return Pair("q", f"{name}+", f"{name}-", video=f"{context or name}.mp4", id=name, **more)


def test_the_next_rows_chosen_and_rejected_responses_take_turns():
    pairs = [pair(name) for name in "abcd"]
    assert [each.mismatched for each in with_mismatched(pairs)] == ["b+", "c-", "d+", "a-"]
    assert with_mismatched(pairs[:2])[1].mismatched == "a-"
    assert [each.mismatched for each in pairs] == [None] * 4


def test_rows_with_the_same_video_and_prompt_are_passed_over():
    pairs = [pair("a", "x"), pair("b", "x"), pair("c", "y"), pair("d", "x"), pair("e", "x")]
    assert [each.mismatched[0] for each in with_mismatched(pairs)] == ["c", "c", "d", "c", "c"]
    pairs = [pair("a", "x"), Pair("another question", "b+", "b-", video="x.mp4")]
    assert [each.mismatched for each in with_mismatched(pairs)] == ["b+", "a-"]


def test_single_responses_and_sft_rows():
    pairs = [
        Pair("q", "", "bad", video="a.mp4", loss="undesirable"),
        Pair("q", "good", "", video="b.mp4", loss="desirable"),
        Pair("q", "best", "", video="c.mp4", loss="sft"),
    ]
    assert [each.mismatched for each in with_mismatched(pairs)] == ["good", "best", None]


def test_rows_of_one_video_and_prompt_are_refused():
    with pytest.raises(ValueError, match=r"all 2 rows have the same video and prompt.*apo_zero_unpaired"):
        with_mismatched([pair("a", "x"), pair("b", "x")])
    assert with_mismatched([]) == []
