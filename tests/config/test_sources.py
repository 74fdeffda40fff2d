"""Options from recipes, files and other trainers' habits: what does not fit is dropped with a note, answered, or refused."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from synpo_fast.config.options import LOSS_OPTIONS
from synpo_fast.config.other_names import ALIASES, HINTS
from synpo_fast.config.sources import dump_config, resolve_config
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.errors import UserError
from synpo_fast.run_folder import checkpoint
from synpo_fast.run_folder.resume_choice import resolve_resume
from synpo_fast.training.run_data import read_data
from synpo_fast.training.start import warn_of_schedule
from tests.world import options

NEEDED = ["--model_name_or_path", "tiny:text", "--train_file", "pairs.jsonl", "--output_dir", "out"]
NAMES = {item.name for item in fields(TrainConfig)}


def config(*words):
    return resolve_config([*NEEDED, *words])


def file_of(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return str(file)


def test_a_recipes_options_for_its_own_loss_are_left_out_with_a_note(capsys):
    result = config("--recipe", "synpo", "--loss_type", "dpo")
    assert result.loss_options == {} and result.loss_type == "dpo"
    assert result.gradient_accumulation_steps == 32, "the rest of the recipe counts"
    assert capsys.readouterr().err.splitlines() == [
        "note: alpha, beta, link of recipe synpo belong to its loss synpo and are left out: loss_type=dpo"
    ]
    assert config("--recipe", "dpo", "--loss_type", "synpo").reference == "auto"


def test_a_file_with_a_recipe_does_the_same_and_keeps_its_own_options(tmp_path, capsys):
    file = file_of(tmp_path, "recipe: simpo\nloss_type: dpo\nbeta: 0.3\n")
    assert config("--config", file).loss_options == {"beta": 0.3}
    assert "beta, gamma of recipe simpo" in capsys.readouterr().err


def test_a_recipe_with_its_own_loss_is_taken_whole(capsys):
    assert set(config("--recipe", "synpo", "--loss_type", "synpo").loss_options) == {"alpha", "beta", "link"}
    assert not capsys.readouterr().err


def test_an_option_that_was_typed_stays_an_error():
    with pytest.raises(UserError, match="loss_type=dpo has no option alpha"):
        config("--recipe", "synpo", "--loss_type", "dpo", "--alpha", "3")
    assert set(LOSS_OPTIONS) <= NAMES


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: 1\nfps: 2\nseed: 2\n", "seed is given twice, in line 1 and in line 3"),
        ("model_options:\n  hidden_size: 1\n  hidden_size: 2\n", "hidden_size is given twice, in line 2 and in line 3"),
        ("lr: 1e-4\nlearning_rate: 1e-5\n", "learning_rate is given twice, once as lr$"),
        ("learning_rate: 1e-5\nlr: 1e-4\n", "learning_rate is given twice, once as lr$"),
        ("", "is empty: give options as `name: value`"),
        ("# nothing\n", "is empty"),
        ("- seed\n", "must map options to values .*, but holds a list"),
        ("sede: 1\n", "no option 'sede'; did you mean seed"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, text, told):
    with pytest.raises(UserError, match=told) as caught:
        config("--config", file_of(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(UserError, match=r"run\.yaml' cannot be read: .*utf-8"):
        config("--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_option(alias):
    value = {"model": "tiny:text", "lr": "0.01", "lora_rank": "3", "f_divergence_type": "forward_kl"}[alias]
    more = ["--loss_type", "dpo"] if alias == "f_divergence_type" else []
    words = [word for word in [*NEEDED, *more] if alias != "model" or word not in ("--model_name_or_path", "tiny:text")]
    result = resolve_config([*words, f"--{alias}", value])
    assert str(getattr(result, ALIASES[alias])) == value
    two = [f"--{alias}", value], [f"--{ALIASES[alias]}", value]
    for first, second in (two, reversed(two)):
        with pytest.raises(
            UserError, match=f"{ALIASES[alias]} is given twice, once as {alias}$|--{ALIASES[alias]} is given twice"
        ):
            resolve_config([*words, *first, *second])


@pytest.mark.parametrize(
    "name", ["resume_from_checkpoint", "optim", "torch_dtype", "cutoff_len", "eval_strategy", "val_size"]
)
def test_a_name_of_another_trainer_is_answered(name):
    with pytest.raises(UserError, match=re.escape(f"there is no option {name!r}: {HINTS[name]}")):
        config(f"--{name}", "1")


def test_hints_and_aliases_name_options_there_are_and_hide_none():
    assert set(ALIASES.values()) <= NAMES and not (set(ALIASES) | set(HINTS)) & NAMES
    for name, hint in HINTS.items():
        for word in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", hint):
            assert word in NAMES | {"adapter_off", "frozen_copy", "train_file"}, f"{name}: {word}"


def test_reporters_may_be_none(tmp_path):
    assert config("--report_to", "none").report_to == ()
    assert config("--config", file_of(tmp_path, "report_to: [none]\n")).report_to == ()
    with pytest.raises(UserError, match="lora_target_modules is empty"):
        config("--lora_target_modules", "none")


def test_evaluating_every_so_often_needs_held_out_pairs():
    with pytest.raises(UserError, match="eval_steps=50, but no pairs are held out: set eval_file or eval_split"):
        config("--eval_steps", "50")
    assert config("--eval_steps", "50", "--eval_split", "0.1").eval_steps == 50


def test_the_kept_config_starts_the_run_from_any_folder(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    (tmp_path / "elsewhere").mkdir()
    words = ["--model_name_or_path", "base", "--train_file", "pairs.jsonl", "--video_root", ".", "--output_dir", "out"]
    first = resolve_config([*words, "--feature_cache", "~/features", "--deepspeed", "ds.json", "--resume", "out"])
    file = tmp_path / "kept.yaml"
    file.write_text(dump_config(first))
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = resolve_config(["--config", str(file)])
    assert again == first
    for name in (
        "model_name_or_path",
        "train_file",
        "video_root",
        "output_dir",
        "feature_cache",
        "deepspeed",
        "resume",
    ):
        assert Path(getattr(again, name)).is_absolute(), name
    assert Path(again.train_file).samefile(world / "pairs.jsonl") and Path(again.video_root).samefile(world)
    assert again.feature_cache == str(Path.home() / "features")


def test_what_is_no_path_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = resolve_config(["--model_name_or_path", "org/model", *NEEDED[2:], "--resume", "auto"])
    assert (kept.model_name_or_path, kept.resume, kept.video_root) == ("org/model", "auto", None)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"warmup_steps": 6}, "warning: warmup_steps=6, and the run has 6 steps"),
        ({"warmup_steps": 5}, ""),
        ({"warmup_ratio": 1.0}, "warning: warmup_ratio=1, and the run has 6 steps"),
        ({"max_steps": -1, "warmup_steps": 4}, "and the run has 4 steps"),  # 16 pairs, 4 a step
        ({"max_steps": 1}, ""),
        ({"warmup_steps": 2, "lr_scheduler_type": "constant"}, "has no effect with lr_scheduler_type=constant"),
    ],
    ids=str,
)
def test_a_warm_up_beyond_the_run_is_said(world, tmp_path, capsys, change, told):
    values = {**options(world, tmp_path / "out"), **change}
    config = TrainConfig(**values)
    data = read_data(config)
    capsys.readouterr()
    warn_of_schedule(config, data, 1)
    shown = capsys.readouterr().err
    assert told in shown and bool(told) == bool(shown)


def save_weights(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def make_checkpoints(folder, *steps):
    for step in steps:
        checkpoint.write_checkpoint(
            folder,
            step,
            save_model=save_weights,
            optimizer_state={},
            trainer_state={"state": {"step": step}},
            keep=None,
        )
    return folder


def resume(tmp_path, value):
    return resolve_resume(
        TrainConfig(model_name_or_path="x", train_file="x", output_dir=str(tmp_path / "out"), resume=str(value))
    ).resume


def test_the_folder_of_a_run_means_its_newest_checkpoint(tmp_path):
    run = make_checkpoints(tmp_path / "run", 3, 6)
    assert resume(tmp_path, run) == str(run / "checkpoint-000006")
    assert resume(tmp_path, run / "checkpoint-000003") == str(run / "checkpoint-000003")
    (run / "checkpoint-000006" / "state" / "trainer.json").unlink()
    assert resume(tmp_path, run) == str(run / "checkpoint-000003")
    assert resume(tmp_path, "auto") == "auto"
    assert resume(tmp_path, make_checkpoints(tmp_path / "out", 2)) == "auto", "the run's own folder"


def test_a_folder_without_a_checkpoint_to_go_on_from_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint-N folder"):
        resume(tmp_path, tmp_path / "empty")
    run = make_checkpoints(tmp_path / "run", 3)
    (run / "checkpoint-000003" / "state" / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match=r"none of its 1 checkpoints is whole \(checkpoint-000003: state/trainer\.json"):
        resume(tmp_path, run)
