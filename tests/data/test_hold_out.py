"""No held-out pair shows a file that training shows, however the file is called."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo_fast.data.hold_out import connected_groups, files_of, hold_out, num_files
from synpo_fast.data.pair import Clip, Pair
from synpo_fast.testing.clips import write_clip


def pair(name, video=None, *clips, prompt="What moves?"):
    return Pair(prompt, "A ball.", "A dog.", video=video, id=name, clips=tuple(Clip(path, 0.0, 1.0) for path in clips))


def names(pairs):
    return {one.id for one in pairs}


def test_clips_of_one_file_are_not_split(tmp_path):
    """The fault: every clip of a file was a group of its own, so 20 of 101 pairs of one file were held out."""
    clips = [Pair("q", "a", "b", id=f"c{i}", clips=(Clip("long.mp4", float(i), i + 1.0),)) for i in range(100)]
    with pytest.raises(ValueError, match=r"eval_split=0.2: all 101 pairs show the same file.* Give an eval_file"):
        hold_out([*clips, pair("whole", "long.mp4")], 0.2, seed=42, root=tmp_path)
    train, held_out = hold_out([*clips, pair("other", "short.mp4")], 0.2, seed=42, root=tmp_path)
    assert names(held_out) == {"other"} and len(train) == 100


def test_a_file_is_one_file_under_all_its_names(tmp_path):
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "v.mp4", codec="h264", num_frames=2, width=64, height=48)
    (tmp_path / "link.mp4").symlink_to(tmp_path / "in" / "v.mp4")
    os.link(tmp_path / "in" / "v.mp4", tmp_path / "hard.mp4")
    (tmp_path / "folder").symlink_to(tmp_path / "in")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.jpg").write_bytes(b"x")
    (tmp_path / "same_frames").symlink_to(tmp_path / "frames")
    pairs = [
        pair("plain", "in/v.mp4"), pair("dotted", "./in//v.mp4"), pair("link", "link.mp4"), pair("hard", None, "hard.mp4"),
        pair("folder", "folder/v.mp4"), pair("frames", "frames"), pair("frames again", "same_frames"),
        pair("gone", "gone.mp4"), pair("gone again", "./gone.mp4"),
    ]  # fmt: skip
    groups = [{pairs[place].id for place in group} for group in connected_groups(pairs, tmp_path)]
    assert groups == [
        {"plain", "dotted", "link", "hard", "folder"}, {"frames", "frames again"}, {"gone", "gone again"}
    ]  # fmt: skip
    assert num_files(pairs, tmp_path) == 3


def test_clips_connect_the_files_they_join(tmp_path):
    pairs = [
        pair("a", "a"),
        pair("ab", None, "a", "b"),
        pair("c", "c"),
        pair("b", "b"),
        pair("cd", None, "d", "c"),
        pair("e", "e"),
    ]
    groups = [{pairs[place].id for place in group} for group in connected_groups(pairs, tmp_path)]
    assert groups == [{"a", "ab", "b"}, {"c", "cd"}, {"e"}]


def test_text_pairs_with_one_prompt_belong_together(tmp_path):
    pairs = [pair(f"{prompt}{i}", prompt=prompt) for i in range(3) for prompt in ("Why?", "How?", "Who?")]
    train, held_out = hold_out(pairs, 0.3, seed=1, root=tmp_path)
    assert len(held_out) == 3 and not {one.prompt for one in train} & {one.prompt for one in held_out}
    with pytest.raises(ValueError, match=r"all 3 pairs .*\(pairs without a video: the same prompt\)"):
        hold_out(pairs[::3], 0.3, seed=1, root=tmp_path)


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=3), min_size=2, max_size=40),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_no_file_is_on_both_sides(shown, share, seed):
    pairs = [pair(str(place), None, *(f"{file}.mp4" for file in files)) for place, files in enumerate(shown)]
    try:
        train, held_out = hold_out(pairs, share, seed=seed, root="/nowhere")
    except ValueError:
        assert len(connected_groups(pairs, "/nowhere")) == 1
        return
    assert (
        train
        and held_out
        and names(train) | names(held_out) == names(pairs)
        and len(train) + len(held_out) == len(pairs)
    )
    assert not files_of(train, "/nowhere") & files_of(held_out, "/nowhere")
    again = hold_out(pairs, share, seed=seed, root="/nowhere")
    assert (names(again[0]), names(again[1])) == (names(train), names(held_out))


def test_the_share_is_met_where_groups_are_small(tmp_path):
    pairs = [pair(f"{video}-{half}", f"{video}.mp4") for video in range(50) for half in range(2)]
    for share, wanted in ((0.02, 2), (0.2, 20), (0.5, 50), (0.98, 98), (1.0, 98)):
        assert len(hold_out(pairs, share, seed=3, root=tmp_path)[1]) == wanted, share
    assert names(hold_out(pairs, 0.2, seed=3, root=tmp_path)[1]) != names(
        hold_out(pairs, 0.2, seed=4, root=tmp_path)[1]
    )
