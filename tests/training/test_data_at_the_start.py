"""What a run says of its data before the first step: what is held out, what it can not be trained on."""

import pytest

from synpo_fast.data import Clip, Pair, read_manifest, write_manifest
from synpo_fast.training.config import TrainConfig
from synpo_fast.training.run_data import read_data
from tests.training.world import options


def test_the_start_says_how_many_pairs_and_files_are_held_out(world, tmp_path, in_one_process, capsys):
    in_one_process(options(world, tmp_path / "out", max_steps=1, eval_split=0.25, eval_on_start=False, report=False))
    assert "synpo on 12 pairs (4 held out, of 2 files), 1 steps" in capsys.readouterr().err


def test_clips_of_one_file_can_not_be_held_out(world, tmp_path):
    """Said before a model is loaded: 101 pairs of one file were 81 to train on and 20 held out."""
    clips = [Pair("q", "a", "b", id=f"c{i}", clips=(Clip("v0.mp4", i / 100, 1.0),)) for i in range(100)]
    write_manifest(tmp_path / "clips.jsonl", [*clips, Pair("q", "a", "b", id="whole", video="v0.mp4")])
    values = options(world, tmp_path / "out", train_file=str(tmp_path / "clips.jsonl"), video_root=str(world))
    with pytest.raises(ValueError, match=r"eval_split=0\.2: all 101 pairs show the same file"):
        read_data(TrainConfig(**values, eval_split=0.2))


def test_an_eval_file_with_files_that_are_trained_on_is_a_warning(world, tmp_path, caplog):
    pairs = read_manifest(world / "pairs.jsonl")
    write_manifest(tmp_path / "eval.jsonl", pairs[:4])
    values = options(world, tmp_path / "out", eval_file=str(tmp_path / "eval.jsonl"), video_root=str(world))
    data = read_data(TrainConfig(**values))
    assert "2 files of eval_file=" in caplog.text and "are trained on, too" in caplog.text
    assert (len(data.train), len(data.evaluation)) == (16, 4)
    caplog.clear()
    write_manifest(tmp_path / "rest.jsonl", pairs[4:])
    read_data(TrainConfig(**{**values, "train_file": str(tmp_path / "rest.jsonl")}))
    assert not caplog.text
