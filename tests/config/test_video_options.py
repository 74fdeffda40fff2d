"""Options of the video input: frame size, kept features, and how much is read ahead."""

import json
from itertools import pairwise

import pytest
import yaml

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.models.policy import Policy
from synpo_fast.training.engine import Engine
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import read_metrics
from tests.world import options


def test_a_budget_of_video_tokens_is_kept_recorded_and_compared_when_resuming(world, tmp_path, in_one_process):
    more = {"max_steps": 2, "save_steps": 1, "report": False, "min_pixels": 28 * 28, "video_max_tokens": 4}
    in_one_process(options(world, tmp_path / "small", **more))
    in_one_process(options(world, tmp_path / "whole", **{**more, "video_max_tokens": None}))
    small, whole = (read_metrics(tmp_path / name / "metrics.jsonl")[-1]["num_tokens"] for name in ("small", "whole"))
    # 8 pairs of 2 rows of the temporal grid: 4 tokens in all, where the frames' own size has more.
    assert small < whole and (whole - small) % 8 == 0
    assert yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())["video_max_tokens"] == 4
    with pytest.raises(ValueError, match="video_max_tokens was 4, now 6"):
        in_one_process(options(world, tmp_path / "small", **{**more, "video_max_tokens": 6, "resume": "auto"}))


def test_pairs_above_the_budget_are_listed_with_the_reason(world, tmp_path, in_one_process):
    more = {"max_steps": 1, "report": False, "video_max_tokens": 1, "max_bad_share": 1.0}
    with pytest.raises(TrainingStopped, match="none of the 4 pairs could be used"):
        in_one_process(options(world, tmp_path / "out", **more))
    rows = [json.loads(line) for line in (tmp_path / "out" / "skipped_pairs.rank0.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all("more than video_max_tokens=1" in row["reason"] for row in rows)


def test_bounds_that_cross_are_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="min_pixels=200 is above max_pixels=100"):
        TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", min_pixels=200, max_pixels=100)


def test_copies_of_the_next_micro_batch_begin_between_forward_and_backward(
    world, tmp_path, in_one_process, monkeypatch
):
    """On a GPU they then run during the backward. This test watches the calls."""
    calls = []

    def noted(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda self, *args: (calls.append(what(*args)), real(self, *args))[1])

    noted(Policy, "begin_copies", lambda samples: ("copies", *[sample.name for sample in samples]))
    noted(Engine, "forward", lambda micro, scale: ("forward", *[pair.id for pair in micro]))
    noted(Engine, "backward", lambda loss: ("backward",))
    in_one_process(options(world, tmp_path / "out", max_steps=1, report=False))
    names = [call[1] for call in calls if call[0] == "forward"]
    assert len(names) == 4
    steps = [[("forward", name), ("copies", following), ("backward",)] for name, following in pairwise(names)]
    assert calls == [*(call for step in steps for call in step), ("forward", names[-1]), ("backward",)]
