"""A user's mistake is one line that says what to do; an error of a library keeps its traceback."""

import ast
import json
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from synpo_fast import train
from synpo_fast.cli import main as command
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import read_manifest, write_manifest
from synpo_fast.errors import UserError
from synpo_fast.models import load_policy
from synpo_fast.models.lora import add_lora, load_adapter_model
from synpo_fast.models.tiny import tiny_model
from synpo_fast.run_folder.checkpoint import CheckpointError
from synpo_fast.terminal import report_once
from synpo_fast.train import main
from synpo_fast.training import start_checks
from synpo_fast.training.run_data import read_data
from tests.world import ROOT, command_line, options

# A ValueError in these is a user's mistake: options, manifests, checkpoints, models. Elsewhere it is a caller's in Python.
FOR_USERS = [
    "training",
    "config",
    "run_folder",
    "models/lora.py",
    "data/row_files.py",
    "models/feature_cache.py",
    "models/loading.py",
    "models/families/registry.py",
    "models/tiny.py",
]


@pytest.fixture
def never_started(monkeypatch):
    monkeypatch.setattr(train, "run_training", lambda *_: pytest.fail("the run was started"))


def told(capsys, values):
    """The last line that the command prints, after exit status 2 and without a traceback."""
    assert main(command_line(values)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[:-1] == ["synpo-fast train: loading libraries"]
    assert lines[-1].startswith("synpo-fast train: error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"video_root": "nowhere"}, "video_root='/here/nowhere' does not exist"),
        ({"video_root": "file"}, "video_root='/here/file' is a file, not a folder"),
        ({"train_file": "none.jsonl"}, "train_file='/here/none.jsonl': there is no such manifest"),
        ({"eval_file": "none.jsonl"}, "eval_file='/here/none.jsonl': there is no such manifest"),
        ({"model_name_or_path": "./none"}, "model_name_or_path='./none': there is no such folder"),
        ({"model_name_or_path": "file"}, "is a file: give the folder of the model"),
        ({"video_backend": "ffmpeg"}, "video_backend must be auto or one of pyav"),
    ],
    ids=str,
)  # fmt: skip
def test_files_that_are_not_there_are_named_before_anything_is_loaded(
    world, tmp_path, monkeypatch, capsys, never_started, change, expected
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    found = told(capsys, {**options(world, tmp_path / "out"), **change})
    assert found.count(str(tmp_path)) <= 1, "no path is named twice"
    assert expected in found.replace(str(tmp_path), "/here").replace("'file'", "'/here/file'").replace("'n", "'/here/n")


@pytest.mark.parametrize(
    ("change", "package", "source"),
    [
        ({"report_to": ("wandb",)}, "wandb", "pip install wandb"),
        ({"report_to": ("tensorboard",)}, "tensorboard", "pip install 'synpo-fast[train]'"),
        ({}, "peft", "use_peft=true needs peft"),
        ({}, "deepspeed", "training needs deepspeed"),
        ({"liger_kernels": True}, "liger_kernel", "liger_kernels=true needs liger_kernel"),
    ],
)
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    world, tmp_path, monkeypatch, capsys, never_started, change, package, source
):
    find = start_checks.util.find_spec
    monkeypatch.setattr(start_checks.util, "find_spec", lambda name: None if name == package else find(name))
    assert source in told(capsys, {**options(world, tmp_path / "out"), **change})


def test_the_folder_that_wandb_leaves_behind_is_not_wandb(world, tmp_path, monkeypatch, capsys, never_started):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "wandb" / "__init__.py").exists()])
    assert "needs wandb" in told(capsys, options(world, tmp_path / "out", report_to=("wandb",)))


def test_a_root_under_which_no_video_lies_is_noticed_when_the_manifest_is_read(world, tmp_path):
    (tmp_path / "videos").mkdir()
    config = TrainConfig(**options(world, tmp_path / "out", video_root=str(tmp_path / "videos")))
    with pytest.raises(UserError) as caught:
        read_data(config)
    message = str(caught.value)
    assert "not one of the first 16 videos can be used" in message and "\n" not in message
    assert f"The first should be {(tmp_path / 'videos' / 'v0.mp4').resolve()}" in message
    assert "set video_root" in message


def test_some_lost_videos_are_no_reason_to_stop(world, tmp_path):
    pairs = [replace(pair, video="gone.mp4") for pair in read_manifest(world / "pairs.jsonl")]
    pairs[12] = replace(pairs[12], video="v0.mp4")
    write_manifest(tmp_path / "pairs.jsonl", pairs)
    more = {"train_file": str(tmp_path / "pairs.jsonl"), "video_root": str(world)}
    assert len(read_data(TrainConfig(**{**options(world, tmp_path / "out"), **more})).train) == 16


def test_held_out_videos_are_looked_for_too(world, tmp_path):
    write_manifest(tmp_path / "held_out.jsonl", list(read_manifest(world / "pairs.jsonl")))
    with pytest.raises(UserError, match=r"held_out\.jsonl: not one of the first 16 videos"):
        read_data(TrainConfig(**options(world, tmp_path / "out", eval_file=str(tmp_path / "held_out.jsonl"))))


def raises(error):
    def run_training(config, stopper):
        raise error

    return run_training


def test_a_second_run_in_a_process_is_refused_in_one_line(world, tmp_path, monkeypatch):
    """DeepSpeed keeps its first backend after the process group is gone."""
    monkeypatch.setitem(sys.modules, "deepspeed.comm.comm", SimpleNamespace(cdb=object()))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"run_training was called before in this process.*in a new process$"):
        train.run_training(TrainConfig(**options(world, tmp_path / "out")))


def test_an_error_of_a_library_keeps_its_traceback(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run_training", raises(ValueError("shapes do not match")))
    assert main(command_line(options(world, tmp_path / "out"))) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and "ValueError: shapes do not match" in shown
    assert "--resume auto" in shown.strip().splitlines()[-1]


@pytest.mark.parametrize(("error", "status"), [(UserError("so"), 2), (CheckpointError("so"), 1)])
def test_a_foreseen_error_is_one_line(world, tmp_path, monkeypatch, capsys, error, status):
    monkeypatch.setattr(train, "run_training", raises(error))
    assert main(command_line(options(world, tmp_path / "out"))) == status
    assert capsys.readouterr().err.strip().splitlines()[1:] in (
        [f"synpo-fast train: {word}so"] for word in ("", "error: ")
    )


def test_mistakes_before_the_processes_meet_are_said_by_the_first_of_a_machine(monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["--learning_rate", "inf"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("error") == lines and shown.count("loading libraries") == lines


def test_processes_that_met_say_a_mistake_once(monkeypatch):
    store, answers = dist.HashStore(), []
    monkeypatch.setattr(report_once, "WAIT_SECONDS", 0.1)

    def process(rank):
        same = report_once.first_in(store, "the same", rank=rank, world_size=3)
        answers.append((same, report_once.first_in(store, f"{rank} alone", rank=rank, world_size=3)))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(same for same, _ in answers) == [False, False, True]
    assert [own for _, own in answers] == [True] * 3


def test_a_mistake_that_another_process_says_is_not_said_here(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "run_training", raises(report_once.ReportedByAnotherProcess(UserError("so"))))
    assert main(command_line(options(world, tmp_path / "out"))) == 2
    assert "so" not in capsys.readouterr().err


@pytest.mark.parametrize("place", FOR_USERS)
def test_where_users_mistakes_are_found_no_plain_value_error_is_raised(place):
    """It would reach the user as a traceback. A line that only code of ours can reach is an assertion."""
    path = ROOT / "synpo_fast" / place
    for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                name = node.exc.func.id
                assert name not in ("ValueError", "ImportError"), (
                    f"{file}:{node.lineno}: raise UserError or MissingPackage"
                )


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """An adapter of world/base in a folder of a run's."""
    policy = add_lora(load_policy(str(world / "base"), device="cpu"), r=4)
    folder = tmp_path_factory.mktemp("merge") / "run" / "checkpoint-000001"
    policy.model.save_pretrained(str(folder))
    policy.tokenizer.save_pretrained(str(folder))
    return folder


def name_base(adapter, folder, name):
    """A copy of the adapter in `folder` that calls its base model `name`."""
    folder.mkdir(parents=True)
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | {"base_model_name_or_path": name}))
    return folder


def merge_error(capsys, *words):
    assert command(["merge", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("synpo-fast merge: error: ")
    return line


def test_a_merge_with_no_place_to_write_to_says_so_before_it_loads(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("synpo_fast.models.loading.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("mine")
    assert "is not empty: give a new folder" in merge_error(capsys, adapter, tmp_path / "full")
    assert "is a file" in merge_error(capsys, adapter, tmp_path / "file")
    assert merge_error(capsys, adapter, tmp_path / "file" / "out").endswith(
        f"{tmp_path / 'file' / 'out'} cannot be written: Not a directory; give another place"
    )
    assert f"{tmp_path / 'nope'} is not there: give" in merge_error(capsys, tmp_path / "nope", tmp_path / "out")
    assert f"give one of its checkpoints, {adapter} is the newest" in merge_error(
        capsys, adapter.parent, tmp_path / "out"
    )
    assert "holds no adapter_config.json" in merge_error(capsys, tmp_path, tmp_path / "out")
    assert (tmp_path / "full" / "kept.txt").read_text() == "mine"


def test_a_merge_finds_a_relative_base_from_any_folder(world, adapter, tmp_path, capsys, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(world / "base")
    moved = name_base(adapter, tmp_path / "runs" / "first" / "checkpoint-000001", "models/base")
    (tmp_path / "elsewhere" / "out").mkdir(parents=True)  # an empty folder will do
    monkeypatch.chdir(tmp_path / "elsewhere")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert command(["merge", str(moved), "out"]) == 0
    assert not [each for each in shown if issubclass(each.category, FutureWarning)]
    assert capsys.readouterr().err == "", "no bars of libraries"
    assert (tmp_path / "elsewhere" / "out" / "model.safetensors").is_file()
    assert not list((tmp_path / "elsewhere").glob("*.partial"))
    assert load_adapter_model(moved, None, load_policy("tiny:text").base.dtype)[2] == str(tmp_path / "models" / "base")


def test_a_merge_whose_base_is_nowhere_names_the_option(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = name_base(adapter, tmp_path / "checkpoint-000001", "./models/base")
    line = merge_error(capsys, moved, "out")
    assert "names './models/base' as its base" in line and "--model_name_or_path names another place" in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_merge_with_another_base_is_one_line(adapter, tmp_path, capsys):
    line = merge_error(capsys, adapter, tmp_path / "out", "--model_name_or_path", "tiny:text")
    assert "was not trained on 'tiny:text'" in line
    model, tokenizer = tiny_model("text")
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path / "text"))
    with pytest.raises(UserError, match=r"does not fit its base model '.*text'"):
        load_adapter_model(adapter, str(tmp_path / "text"), torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
