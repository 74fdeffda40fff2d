"""A second run on the same videos decodes none of them, and training hashes no pixels: counted, with the same losses."""

import os
import shutil

import pytest
import torch

from synpo_fast.data import encoding
from synpo_fast.models import digest
from synpo_fast.training import run_model
from synpo_fast.training.metrics import read_metrics
from tests.world import options


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    names: list[str] = []
    real = encoding.pair_frames
    monkeypatch.setattr(encoding, "pair_frames", lambda pair, *a, **k: (names.append(pair.id), real(pair, *a, **k))[1])
    return names


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """The number of tensor bytes that each digest read."""
    sizes: list[int] = []
    real = digest._digest

    def counted(facts, tensors):
        tensors = list(tensors)
        sizes.append(sum(tensor.nbytes for _, tensor in tensors))
        return real(facts, tensors)

    monkeypatch.setattr(digest, "_digest", counted)
    return sizes


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def counts(folder):
    last = read_metrics(folder / "metrics.jsonl")[-1]
    return last["feature_cache/hits"], last["feature_cache/misses"]


def test_a_second_run_decodes_nothing(world, tmp_path, in_one_process, decoded, hashed, capsys):
    more = {"max_steps": 4, "report": False, "feature_cache": str(tmp_path / "features")}
    in_one_process(options(world, tmp_path / "plain", **{**more, "feature_cache": None}))
    assert len(decoded) == 16 and not hashed
    in_one_process(options(world, tmp_path / "first", **more))
    assert counts(tmp_path / "first") == (8, 8), "two pairs a video"
    decoded.clear(), hashed.clear()
    in_one_process(options(world, tmp_path / "second", **more))
    assert not decoded
    assert len([size for size in hashed if size]) == 1, "the tower's weights, at the start"
    assert counts(tmp_path / "second") == (16, 0)
    assert "feature_cache: 16 of 16 videos were found there" in capsys.readouterr().err
    assert losses(tmp_path / "plain") == losses(tmp_path / "first") == losses(tmp_path / "second")


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_precomputed_reference_hashes_no_pixels_and_serves_a_resumed_run(
    world, tmp_path, in_one_process, decoded, hashed, use_peft
):
    more = {"loss_type": "dpo", "reference": "precomputed", "zero_stage": 1, "use_peft": use_peft, "report": False}
    values = options(world, tmp_path / "out", **more, max_steps=4, save_steps=2)
    in_one_process({**values, "output_dir": str(tmp_path / "whole")})
    assert len([size for size in hashed if size]) == 1, "the reference's weights, at the start"
    assert len(decoded) == 32, "each pair once for the reference and once to train on"
    in_one_process({**values, "max_steps": 2})
    made = (tmp_path / "out" / "reference.pt").stat().st_mtime_ns
    in_one_process({**values, "resume": "auto"})
    assert (tmp_path / "out" / "reference.pt").stat().st_mtime_ns == made
    weights = [name for name in os.listdir(tmp_path / "out") if name.startswith("checkpoint-")]
    assert sorted(weights)[-1] == "checkpoint-000004"


def test_a_video_that_was_replaced_has_the_reference_made_again_before_the_first_step(world, tmp_path, in_one_process):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    more = {"loss_type": "dpo", "reference": "precomputed", "max_steps": 4, "report": False}
    values = options(copy, tmp_path / "out", **more)
    in_one_process({**values, "max_steps": 2})
    shutil.copyfile(copy / "v5.mp4", copy / "v0.mp4")
    assert in_one_process({**values, "resume": "auto"}).step == 4
    assert len(list((tmp_path / "out" / "superseded").rglob("reference*.pt*"))) == 1
    made = (tmp_path / "out" / "reference.pt").stat().st_mtime_ns
    in_one_process({**values, "resume": "auto", "max_steps": 5})
    assert (tmp_path / "out" / "reference.pt").stat().st_mtime_ns == made


def test_a_video_replaced_while_a_run_trains_is_named_with_the_way_on(world, tmp_path, in_one_process, monkeypatch):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    values = options(copy, tmp_path / "out", loss_type="dpo", reference="precomputed", max_steps=4, report=False)
    real = run_model.Precomputed

    def replaced(*args, **more):
        shutil.copyfile(copy / "v5.mp4", copy / "v0.mp4")
        return real(*args, **more)

    monkeypatch.setattr(run_model, "Precomputed", replaced)
    with pytest.raises(
        ValueError, match=r"no reference for sample 'p0-\d' as it is now.* delete the file.* --resume auto"
    ):
        in_one_process(values)


def test_captions_are_written_from_stored_videos(world, tmp_path, in_one_process):
    more = {
        "feature_cache": str(tmp_path / "features"),
        "eval_split": 0.25,
        "num_eval_captions": 1,
        "max_new_tokens": 3,
    }
    values = options(world, tmp_path / "a", **more, max_steps=1, report=False)
    in_one_process(values)
    in_one_process({**values, "output_dir": str(tmp_path / "b")})
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("a", "b")]
    captions = [[row["eval_captions"] for row in each if "eval_captions" in row] for each in rows]
    assert captions[0] and captions[0] == captions[1]
    assert torch.equal(*(torch.tensor([row["eval_loss"] for row in each if "eval_loss" in row]) for each in rows))
