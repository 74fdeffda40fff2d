"""Folders with several splits are never read as one: the test rows would be trained on."""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from synpo_fast.cli import main
from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.manifest import ManifestError, read_manifest
from synpo_fast.training.run_data import read_data


def row(name):
    return {"prompt": f"What of {name}?", "chosen": "A ball.", "rejected": "A dog."}


def fill(folder, *files):
    """Each file holds one row that names it."""
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist([row(file)]), path)
        else:
            path.write_text(json.dumps(row(file)) + "\n")
    return folder


def read(path):
    return [pair.prompt.removeprefix("What of ").removesuffix("?") for pair in read_manifest(path)]


@pytest.mark.parametrize(
    ("files", "told", "train"),
    [
        (
            ["test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            r"test \(1 file\), train \(2 files\)",
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ),
        (
            ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet", "data/validation-0.parquet"],
            r"test \(1 file\), train \(1 file\), validation \(1 file\)",
            ["data/train-00000-of-00001.parquet"],
        ),
        (["train.jsonl", "dev.jsonl"], r"train \(1 file\), validation \(1 file\)", ["train.jsonl"]),
        (["train/a.parquet", "eval/a.parquet"], r"test \(1 file\), train", ["train/a.parquet"]),
        (["pairs_train.parquet", "pairs.parquet"], r"no split named \(1 file\), train", ["pairs_train.parquet"]),
    ],
)  # fmt: skip
def test_splits_are_named_and_one_can_be_chosen(tmp_path, files, told, train):
    folder = fill(tmp_path / "set", *files)
    with pytest.raises(
        ManifestError, match=rf"set holds several splits: .*{told}.*; name one, as in .*set:train, or give one"
    ):
        read_manifest(folder)
    assert read(f"{folder}:train") == train
    with pytest.raises(ManifestError, match=r"set has no split 'holdout': it has .*train"):
        read_manifest(f"{folder}:holdout")


def test_every_name_of_a_split_finds_it(tmp_path):
    folder = fill(tmp_path, "train.parquet", "val-0.parquet")
    for name in ("validation", "val", "dev", "valid"):
        assert read(f"{folder}:{name}") == ["val-0.parquet"]


def test_one_split_or_none_is_read_as_before(tmp_path):
    assert read(fill(tmp_path / "a", "train-0.parquet", "train-1.parquet")) == ["train-0.parquet", "train-1.parquet"]
    assert read(fill(tmp_path / "b", "part-0.parquet", "part-1.parquet")) == ["part-0.parquet", "part-1.parquet"]
    assert read(fill(tmp_path / "c", "pairs.jsonl")) == ["pairs.jsonl"]
    assert read(fill(tmp_path / "d", "data/train-0.parquet")) == ["data/train-0.parquet"]
    assert read(fill(tmp_path / "latest:train", "contest.parquet")) == ["contest.parquet"], (
        "a colon in a name, test in a word"
    )
    with pytest.raises(
        ManifestError, match=r"e holds 2 .jsonl files that name no split, the first is new.jsonl: give one file"
    ):
        read_manifest(fill(tmp_path / "e", "new.jsonl", "old.jsonl"))
    with pytest.raises(ManifestError, match=r"b has no split 'train': its files name no split"):
        read_manifest(f"{tmp_path / 'b'}:train")


def test_splits_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets", reason="writes the folders that are read here")
    parts = {name: datasets.Dataset.from_list([row(name)]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(ManifestError, match=r"several splits: test \(1 file\), train \(1 file\)"):
        read_manifest(tmp_path / "set")
    assert read(f"{tmp_path / 'set'}:train") == read(tmp_path / "set" / "train") == ["train"]
    (tmp_path / "set" / "dataset_dict.json").unlink()
    with pytest.raises(ManifestError, match=r"several splits: test \(1 file\), train \(1 file\)"):
        read_manifest(tmp_path / "set")


def test_training_and_the_commands_know_it(tmp_path, capsys):
    folder, out = fill(tmp_path / "set", "train-0.parquet", "test-0.parquet"), tmp_path / "out.jsonl"
    values = {"model_name_or_path": "tiny:text", "output_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="holds several splits"):
        read_data(TrainConfig(train_file=str(folder), **values))
    data = read_data(TrainConfig(train_file=f"{folder}:train", eval_file=f"{folder}:test", **values))
    assert [len(data.train), len(data.evaluation)] == [1, 1] and "test-0" in data.evaluation[0].prompt
    assert data.train_root == tmp_path, "as for the folder itself"
    assert main(["pairs", "import", "--format", "trl", str(folder), str(out)]) == 2
    assert "holds several splits" in capsys.readouterr().err
    assert main(["pairs", "import", "--format", "trl", f"{folder}:train", str(out)]) == 0
    assert "train-0" in out.read_text() and "test-0" not in out.read_text()
    assert main(["pairs", "check", str(folder)]) == 1
    assert "holds several splits" in capsys.readouterr().out
    assert main(["pairs", "check", f"{folder}:test"]) == 0
