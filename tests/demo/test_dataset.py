"""The demo's manifests: what is in them is true of the videos, and unseen is unseen."""

import json

import pytest

from synpo_fast.data import decode_frames, read_manifest
from synpo_fast.data.comparisons import compare_responses
from synpo_fast.demo.captions import caption_text
from synpo_fast.demo.dataset import EVERY, NUM_RESPONSES, _make_clip, make_dataset, read_unseen


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, said):
    out = tmp_path_factory.mktemp("data")
    make_dataset(out, seed=5, num_train=70, num_unseen=31, on_progress=lambda *numbers: said.append(numbers))
    return out


def test_progress_is_told(folder, said):
    assert said == [(100, 101), (101, 101)]


def test_pairs_have_a_better_and_a_worse_caption(folder):
    pairs = read_manifest(folder / "pairs.jsonl")
    assert len(pairs) == 70
    assert all(10 >= pair.chosen_score > pair.rejected_score for pair in pairs)
    assert all((pair.chosen == pair.ground_truth) == (pair.chosen_score == 10) for pair in pairs)
    assert 0 < sum(pair.chosen_score < 10 for pair in pairs) < 35  # chosen is not always the truth
    assert len({pair.rejected_score for pair in pairs}) > 3


def test_every_fourth_row_has_several_responses_of_which_the_careful_one_is_the_best(folder):
    pairs = read_manifest(folder / "pairs.jsonl")
    assert [len(pair.responses) for pair in pairs] == [NUM_RESPONSES if at % EVERY == 0 else 0 for at in range(70)]
    for pair in pairs[::EVERY]:
        scores = sorted(response.score for response in pair.responses)
        assert scores[-1] == pair.chosen_score > scores[-2]
        assert len(compare_responses(pair, "best_rest").comparisons) == NUM_RESPONSES - 1


def test_the_warm_up_learns_from_captions_that_are_mostly_wrong(folder):
    rows = read_manifest(folder / "warm_up.jsonl")
    truths = {pair.video: pair.ground_truth for pair in read_manifest(folder / "pairs.jsonl")}
    assert {row.loss for row in rows} == {"sft"} and {row.video for row in rows} == set(truths)
    assert 0 < sum(row.chosen == truths[row.video] for row in rows) < 35


def test_unseen_scenes_are_in_no_training_video(folder):
    clips = read_unseen(folder)
    seen = {pair.ground_truth for pair in read_manifest(folder / "pairs.jsonl")}
    assert len(clips) == 31 and not seen & {clip.truth for clip in clips}
    assert [pair.ground_truth for pair in read_manifest(folder / "held_out.jsonl")] == [clip.truth for clip in clips]


def test_a_scene_to_avoid_is_drawn_again(tmp_path):
    (tmp_path / "videos").mkdir()
    first = _make_clip(tmp_path, "0 unseen", 0, avoid=frozenset())
    assert _make_clip(tmp_path, "0 unseen", 0, avoid=frozenset({first.scene})).scene != first.scene


def test_videos_are_in_both_codecs_and_as_long_as_their_scenes(folder):
    codecs = set()
    for clip in read_unseen(folder)[:6]:
        frames, info = decode_frames(clip.video, root=folder)
        codecs.add(info.codec)
        assert len(frames) == 4 * len(clip.scene) and caption_text(clip.scene) == clip.truth
    assert codecs == {"vp9", "h264"}


def test_a_complete_folder_is_left_alone_and_an_incomplete_one_made_again(folder):
    before = (folder / "pairs.jsonl").read_bytes()
    file = folder / "videos" / "unseen-0000.webm"
    video = file.read_bytes()
    file.write_bytes(b"")
    make_dataset(folder, seed=5, num_train=70, num_unseen=31, on_progress=lambda *_: None)
    assert file.read_bytes() == b""
    (folder / "done").unlink()
    make_dataset(folder, seed=5, num_train=70, num_unseen=31, on_progress=lambda *_: None)
    assert (folder / "pairs.jsonl").read_bytes() == before and len(file.read_bytes()) == len(video)


def test_another_seed_is_another_world(folder, tmp_path):
    make_dataset(tmp_path, seed=6, num_train=3, num_unseen=2, on_progress=lambda *_: None)
    first = json.loads((tmp_path / "unseen.json").read_text())
    assert first != json.loads((folder / "unseen.json").read_text())[:2]
