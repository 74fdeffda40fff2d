"""Options that change what a run does, and set-ups between which it must make no difference."""

import json
import shutil

import pytest
import torch

from synpo_fast.run_folder.checkpoint import newest_checkpoint
from synpo_fast.training import loop
from synpo_fast.training.engine import Engine, launch_environment
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import read_metrics
from tests.training.test_faults import final_weights, poison
from tests.world import options


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.0},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 0.1},
        {"max_grad_norm": 0.0, "adam_epsilon": 1e-3},
        {"lora_dropout": 0.5},
        {"lora_alpha": 16},
        {"warmup_steps": 3},
        {"lr_scheduler_type": "constant"},
        {"alpha": 3.0},
        {"link": "logsigmoid"},
        {"auxiliary_nll": 0.5},
        {"num_frames": None, "fps": 1.0, "min_frames": 1, "max_frames": 3},
        {"lora_target_modules": ("q_proj",)},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_it_changes_the_run(world, tmp_path, in_one_process, change):
    values = options(world, tmp_path / "a", max_steps=3, save_steps=0, report=False)
    in_one_process(values)
    in_one_process({**values, **change, "output_dir": str(tmp_path / "b")})
    ends = [final_weights(tmp_path / name, 3) for name in ("a", "b")]
    same = set(ends[0]) == set(ends[1]) and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not same


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "zero_stage": 3},
        {"max_batch_tokens": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"row_tokens": 60, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
        {"share_prefix": False},
        {"attn_implementation": "eager"},
        {"dataloader_num_workers": 1},
        {"offload_optimizer": True},
        {"offload_optimizer": True, "zero_stage": 3},
        {"video_backend": "pyav"},
    ],
    ids=lambda change: "-".join(f"{name}={value}" for name, value in change.items())[:50],
)
def test_it_makes_no_difference_to_the_losses(world, tmp_path, in_one_process, change):
    values = options(world, tmp_path / "a", max_steps=3, save_steps=0, report=False)
    in_one_process(values)
    in_one_process({**values, **change, "output_dir": str(tmp_path / "b")})
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=2e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_keeps_fp32_masters_and_resumes_bit_for_bit(world, tmp_path, in_one_process, zero_stage):
    """At this learning rate no step moves a bf16 weight by itself: only masters add the steps up."""
    values = options(
        world, tmp_path / "a", bf16=True, zero_stage=zero_stage, learning_rate=2e-5, max_steps=6, save_total_limit=9,
        lr_scheduler_type="constant", report=False,
    )  # fmt: skip
    in_one_process(values)
    in_one_process({**values, "output_dir": str(tmp_path / "b"), "resume": str(tmp_path / "a" / "checkpoint-000003")})
    ends = [final_weights(tmp_path / name, 6) for name in ("a", "b")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    # The masters are what is saved.
    assert {value.dtype for value in ends[0].values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ends[0].values())
    assert losses(tmp_path / "a")[3:] == losses(tmp_path / "b")


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_offloading_recovers_from_a_step_that_is_not_finite(world, tmp_path, in_one_process, monkeypatch, zero_stage):
    poison(monkeypatch, {1})
    values = options(
        world, tmp_path / "out", max_steps=4, bf16=True, offload_optimizer=True, zero_stage=zero_stage, report=False
    )
    state = in_one_process(values)
    assert (state.nonfinite_steps, state.nonfinite_in_a_row) == (1, 0)


def test_features_are_kept_between_runs(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "a", max_steps=4, report=False, feature_cache=str(tmp_path / "features"))
    in_one_process(values)
    kept = sorted((tmp_path / "features").glob("*.pt"))
    assert len(kept) == 8  # the videos
    in_one_process({**values, "output_dir": str(tmp_path / "b")})
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert sorted((tmp_path / "features").glob("*.pt")) == kept


def test_pairs_that_are_too_long_are_skipped_and_counted(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", max_steps=4, max_length=1, max_bad_share=1.0, report=False)
    with pytest.raises(TrainingStopped) as error:
        in_one_process(values)
    said = str(error.value)
    assert (
        said.startswith("nothing was trained: none of the 16 pairs could be used. 'p")
        and "--overwrite_output_dir" in said
    )
    assert "pairs check" not in said, "which knows no lengths"
    with pytest.raises(TrainingStopped, match="nothing was trained"):
        in_one_process({**values, "resume": "auto"})
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["skipped_pairs"] == 16 and "loss" not in rows[-1]
    assert "more than max_length=1;" in (tmp_path / "out" / "skipped_pairs.rank0.jsonl").read_text()


def test_epochs_and_logging_steps(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", max_steps=-1, num_train_epochs=1.5, logging_steps=4, report=False)
    state = in_one_process(values)
    assert (state.step, state.epoch, state.step_in_epoch) == (6, 1, 2)  # 16 pairs, 4 a step
    assert [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")] == [4, 6]


def test_lines_of_several_steps_are_means_and_go_on_after_a_resume(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "each", report=False)
    in_one_process(values)
    in_one_process({**values, "output_dir": str(tmp_path / "out"), "logging_steps": 4})
    whole = read_metrics(tmp_path / "out" / "metrics.jsonl")
    each = losses(tmp_path / "each")
    assert [row["loss"] for row in whole] == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 2], abs=1e-7)
    shutil.rmtree(tmp_path / "out" / "checkpoint-000006")
    in_one_process({**values, "output_dir": str(tmp_path / "out"), "logging_steps": 4, "resume": "auto"})
    again = read_metrics(tmp_path / "out" / "metrics.jsonl")
    for name in ("step", "loss", "grad_norm", "num_tokens", "epoch"):
        assert [row[name] for row in again] == [row[name] for row in whole], name


def test_a_run_that_was_asked_to_stop_writes_the_same_lines_when_it_goes_on(
    world, tmp_path, in_one_process, monkeypatch
):
    values = options(world, tmp_path / "out", logging_steps=4, report=False)
    in_one_process({**values, "output_dir": str(tmp_path / "whole")})
    step = loop.train_step

    def asked(run, batch):
        run.asked_to_stop = run.state.step == 4
        return step(run, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", asked)
        assert in_one_process(values).step == 5
    in_one_process({**values, "resume": "auto"})
    found, whole = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("out", "whole"))
    assert [(row["step"], row["loss"]) for row in found] == [(row["step"], row["loss"]) for row in whole]


def test_evaluation_keeps_to_the_tokens_of_a_batch(world, tmp_path, in_one_process, monkeypatch):
    taken = []
    forward = Engine.forward
    monkeypatch.setattr(
        Engine, "forward", lambda self, pairs, scale: taken.append(len(pairs)) or forward(self, pairs, scale)
    )
    rows = []
    for name, tokens in (("free", None), ("bounded", 1)):
        taken.clear()
        values = options(world, tmp_path / name, max_steps=1, eval_split=0.5, max_batch_tokens=tokens, report=False)
        in_one_process({**values, "per_device_eval_batch_size": 4, "num_eval_captions": 0})
        rows += [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "eval_loss" in row]
        assert taken[:2] == ([1, 1] if tokens else [4, 4]), "the first evaluation is before the first step"
    assert len({round(row["eval_loss"], 5) for row in rows[::2]}) == 1, "before the first step"


def test_resuming_an_older_checkpoint_beside_later_ones_is_refused(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "out", max_steps=2, save_steps=1, report=False)
    in_one_process(values)
    with pytest.raises(ValueError, match="holds later checkpoints, checkpoint-000002 the last"):
        in_one_process({**values, "resume": str(tmp_path / "out" / "checkpoint-000001")})
    with pytest.raises(ValueError, match="lora_alpha was 8, now 64"):
        in_one_process({**values, "resume": "auto", "lora_alpha": 64})
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-000002"


def test_the_kept_config_starts_the_same_run_and_deletes_nothing(world, tmp_path, in_one_process):
    from synpo_fast.config.sources import resolve_config

    values = options(world, tmp_path / "out", max_steps=1, report=False, overwrite_output_dir=True)
    in_one_process(values)
    kept = resolve_config(["--config", str(tmp_path / "out" / "config.yaml")])
    assert not kept.overwrite_output_dir and kept.resume is None
    assert kept.learning_rate == values["learning_rate"]


def test_a_folder_of_a_text_model_trains(tmp_path, in_one_process):
    from synpo_fast.data import Pair, write_manifest
    from synpo_fast.models import load_policy

    policy = load_policy("tiny:text", device="cpu")
    policy.model.save_pretrained(str(tmp_path / "base"))
    policy.tokenizer.save_pretrained(str(tmp_path / "base"))
    write_manifest(tmp_path / "pairs.jsonl", [Pair("Say a.", f"yes {i}", f"no {i}", id=str(i)) for i in range(8)])
    in_one_process(options(tmp_path, tmp_path / "out", max_steps=2, report=False))
    assert len(losses(tmp_path / "out")) == 2


def test_decoding_on_a_gpu_that_is_not_there_is_refused(world, tmp_path, in_one_process):
    with pytest.raises(ValueError, match="video_device=cuda"):
        in_one_process({**options(world, tmp_path / "out"), "video_device": "cuda"})


def test_a_manifest_that_is_not_there_is_named(world, tmp_path, in_one_process):
    with pytest.raises(ValueError, match=r"there is no manifest .nowhere\.jsonl."):
        in_one_process({**options(world, tmp_path / "out"), "train_file": "nowhere.jsonl"})


def test_entries_of_a_deepspeed_file(world, tmp_path, in_one_process):
    file = tmp_path / "ds.json"
    for content, message in (
        ({"train_batch_size": 8}, "sets train_batch_size"),
        ({"zero_optimization": {"stage": 1}}, r"sets zero_optimization\.stage"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            in_one_process({**options(world, tmp_path / "no", deepspeed=str(file)), "model_name_or_path": "no/such"})
    file.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}))
    values = options(world, tmp_path / "a", max_steps=3, zero_stage=3, report=False)
    in_one_process(values)
    in_one_process({**values, "output_dir": str(tmp_path / "b"), "deepspeed": str(file)})
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=2e-5)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_deepspeed_takes_no_more_memory_for_gradients_than_an_adapter_has(
    world, tmp_path, in_one_process, monkeypatch, zero_stage
):
    import deepspeed

    made = []
    really = deepspeed.initialize
    monkeypatch.setattr(deepspeed, "initialize", lambda **given: made.append(really(**given)) or made[-1])
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 12345}}))
    values = options(world, tmp_path / "a", max_steps=1, zero_stage=zero_stage, report=False)
    in_one_process(values)
    in_one_process({**values, "output_dir": str(tmp_path / "b"), "deepspeed": str(file)})
    trained = sum(weights.numel() for weights in final_weights(tmp_path / "a", 1).values())
    assert [engine.optimizer.reduce_bucket_size for engine, *_ in made] == [trained, 12345]


def test_processes_of_a_scheduler_find_each_other_or_say_what_is_missing():
    slurm = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS=8, but MASTER_ADDR is not set"):
        launch_environment(slurm)
    found = launch_environment({**slurm, "MASTER_ADDR": "node1"})
    assert found == {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert launch_environment({**mpi, "MASTER_ADDR": "x", "MASTER_PORT": "5"})["MASTER_PORT"] == "5"
    assert launch_environment({"SLURM_STEP_NUM_TASKS": "1"})["WORLD_SIZE"] == "1"
