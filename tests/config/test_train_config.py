"""A config comes from a recipe, a file and a command line; whatever is wrong is said before a model is loaded."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from synpo_fast.config.option_help import groups, help_text, markdown
from synpo_fast.config.sources import dump_config, recipe_names, resolve_config
from synpo_fast.config.train_config import TrainConfig
from tests.world import ROOT, environment

NEEDED = ["--model_name_or_path", "tiny:text", "--train_file", "pairs.jsonl", "--output_dir", "out"]


def config(*words: str) -> TrainConfig:
    return resolve_config([*NEEDED, *words])


def test_later_sources_win_over_earlier_ones(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-4\nlora_r: 16\nfps: 2\n")
    result = config("--recipe", "synpo", "--config", str(file), "--lora_r", "32")
    assert (result.lora_r, result.learning_rate, result.fps) == (32, 2e-4, 2.0)
    assert (result.alpha, result.gradient_accumulation_steps) == (30.0, 32)  # the recipe's


def test_a_file_may_name_its_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: dpo\nbeta: 0.3\n")
    result = config("--config", str(file))
    assert (result.loss_type, result.beta, result.reference) == ("dpo", 0.3, "adapter_off")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], {"bf16": True}),
        (["--bf16", "false"], {"bf16": False}),
        (["--bf16=no", "--share_prefix=0"], {"bf16": False, "share_prefix": False}),
        (["--max_steps", "-1"], {"max_steps": -1}),
        (["--num_frames", "none"], {"num_frames": None}),
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--report_to", "tensorboard,wandb"], {"report_to": ("tensorboard", "wandb")}),
        (["--model_options", "hidden_size=64,tie_word_embeddings=true"],
         {"model_options": {"hidden_size": 64, "tie_word_embeddings": True}}),
    ],
)  # fmt: skip
def test_words_become_values_of_the_right_type(words, expected):
    result = config(*words)
    for name, value in expected.items():
        assert getattr(result, name) == value
        assert type(getattr(result, name)) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "no option 'lerning_rate'; did you mean learning_rate"),
        (["--lora_r", "big"], "lora_r must be a whole number, got 'big'"),
        (["--lora_r", "1.5"], "lora_r must be a whole number"),
        (["--beta", "big"], "beta must be a number, got 'big'"),
        (["--beta"], "^--beta needs a value$"),
        (["--lr", "--bf16"], "^--lr needs a value$"),
        (["--video_root", "--bf16"], "^--video_root needs a value$"),
        (["--config"], "^--config needs a value$"),
        (["--betta"], "no option 'betta'; did you mean beta"),
        (["--bf16", "maybe"], "bf16 must be true or false, got 'maybe'"),
        (["--seed", "none"], "seed needs a value"),
        (["--seed", "1", "--seed", "2"], "--seed is given twice"),
        (["seed", "1"], "expected an option"),
        (["--recipe", "dppo"], "unknown recipe 'dppo', expected one of dpo"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' is not a file"),
        (["--loss_type", "ppo"], "loss_type must be one of synpo, dpo"),
        (["--loss_type", "simpo", "--alpha", "3"], "loss_type=simpo has no option alpha; it has beta, gamma"),
        (["--loss_type", "sft", "--nll_weight", "1"], "loss_type=sft has no option nll_weight; it has none"),
        (["--loss_type", "cpo", "--nll_reduce", "mean"], "loss_type=cpo: nll_reduce is 'mean', expected one of 'token_mean'"),
        (["--loss_type", "dpo", "--reference_free", "--reference", "frozen_copy"], "reference_free=true reads no reference"),
        (["--loss_type", "dpo", "--reference_free", "--profile", "2"], "leave reference_free unset"),
        (["--loss_type", "sft", "--auxiliary_nll", "1"], "leave auxiliary_nll at 0"),
        (["--auxiliary_target", "ground_truth"], "has no effect while auxiliary_nll is 0"),
        (["--reference", "frozen_copy"], "loss_type=synpo reads no reference"),
        (["--loss_type", "dpo", "--reference", "adapter_off", "--use_peft", "false"], "needs use_peft=true"),
        (["--loss_type", "dpo", "--reference", "frozen_copy", "--zero_stage", "3"], "use adapter_off"),
        (["--bf16", "--fp16"], "choose one"),
        (["--bf16", "--zero_stage", "0"], "no fp32 master weights"),
        (["--zero_stage", "4"], "zero_stage is 4, expected at most 3"),
        (["--zero_stage", "3", "--diagnostics", "5"], "diagnostics need whole gradients"),
        (["--zero_stage", "3", "--row_tokens", "100"], "leave row_tokens unset"),
        (["--zero_stage", "3", "--feature_cache", "x"], "leave feature_cache unset"),
        (["--zero_stage", "0", "--offload_optimizer"], "offload_optimizer needs"),
        (["--feature_cache", "x", "--freeze_vision", "false", "--use_peft", "false"], "needs freeze_vision=true"),
        (["--freeze_vision", "false"], "has no effect with use_peft=true"),
        (["--adam_beta1", "1"], "adam_beta1 is 1.0, expected less than 1"),
        (["--eval_file", "x", "--eval_split", "0.1"], "eval_file or eval_split, not both"),
        (["--min_frames", "9", "--max_frames", "8"], "min_frames=9 is above max_frames=8"),
        (["--resume", "auto", "--overwrite_output_dir"], "choose one"),
        (["--report_to", "mlflow"], "report_to takes tensorboard, wandb or none"),
        (["--max_steps", "0"], "max_steps must be above 0"),
        (["--max_steps", "-3"], "max_steps is -3, expected above 0, or -1 to use num_train_epochs"),
        (["--diagnostics", "2", "--loss_type", "sft"], "loss_type=sft has none"),
    ],
)  # fmt: skip
def test_a_mistake_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        config(*words)


@pytest.mark.parametrize("missing", ["model_name_or_path", "train_file", "output_dir"])
def test_what_has_no_default_is_asked_for(missing):
    words = list(NEEDED)
    at = words.index(f"--{missing}")
    del words[at : at + 2]
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        resolve_config(words)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        config("--config", str(file))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_comes_back_from_its_dump(name, tmp_path):
    first = config("--recipe", name)
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(first))
    assert resolve_config(["--config", str(file)]) == first


def test_the_recipe_synpo_is_the_authors_set_up():
    synpo = config("--recipe", "synpo")
    assert (synpo.learning_rate, synpo.num_train_epochs, synpo.warmup_ratio) == (5e-6, 5, 0.1)
    assert (synpo.lora_r, synpo.lora_alpha, synpo.lora_dropout) == (128, 64, 0.05)
    assert (synpo.fps, synpo.min_frames, synpo.max_frames) == (0.5, 8, 16)
    assert synpo.loss_options == {"alpha": 30.0, "beta": 0.2, "link": "sigmoid"}


def test_every_option_is_in_the_help_and_in_the_docs():
    names = {item.name for item in fields(TrainConfig)}
    assert {name for _, options in groups() for name, *_ in options} == names
    assert all(f"--{name} " in help_text() for name in names)
    docs = (ROOT / "docs" / "training.md").read_text()
    assert markdown() in docs, "docs/training.md: its table of options is not what option_help.markdown() gives"


def test_options_in_the_docs_exist():
    import re

    names = {item.name for item in fields(TrainConfig)} | {"recipe", "config", "print_config", "help"}
    launcher = {"num_gpus", "hostfile", "master_addr", "master_port", "num_nodes", "node_rank", "launcher", "no_ssh"}
    for file in [ROOT / "docs" / "training.md", ROOT / "README.md"]:
        for block in re.findall(r"(?:train\.py|synpo-fast train|synpo_fast\.train)[^\n`]*", file.read_text()):
            for name in re.findall(r"--([a-z_]+)", block):
                assert name in names | launcher, f"{file.name}: {block}"


def test_mistakes_and_print_config_load_no_model(tmp_path):
    """Through the command itself: quick, and with the exit status that says so."""
    code = "import sys; from synpo_fast.train import main; status = main(sys.argv[1:]);" \
        "print('LOADED', [m for m in ('transformers', 'deepspeed') if m in sys.modules]); sys.exit(status)"  # fmt: skip
    for words, status in ((["--lora_rr", "3"], 2), ([*NEEDED, "--print_config"], 0), (["--help"], 0)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment(), cwd=tmp_path
        )
        assert done.returncode == status, done.stderr
        assert "LOADED []" in done.stdout
        if "--print_config" in words:
            shown = yaml.safe_load(done.stdout.split("LOADED")[0])
            assert shown["model_name_or_path"] == "tiny:text"
    assert not list(Path(tmp_path).iterdir())
