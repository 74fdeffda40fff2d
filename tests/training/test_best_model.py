"""The best evaluation of a run: when one is better, which files are kept, early stopping, and the same choice after a resume."""

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import read_manifest, write_manifest
from synpo_fast.models import load_policy
from synpo_fast.models.lora import add_lora
from synpo_fast.references import is_fresh
from synpo_fast.run_folder.best_files import (
    check_top_is_free,
    copies_are_intact,
    copy_best,
    is_stored_elsewhere,
    remove_best,
)
from synpo_fast.run_folder.checkpoint import CheckpointError, list_checkpoints, write_checkpoint
from synpo_fast.run_folder.model_files import names_beside_weights, save_model_files
from synpo_fast.training import loop, start
from synpo_fast.training.best_model import BestSoFar, judge, resumed_best
from synpo_fast.training.evaluation_loop import Evaluator
from synpo_fast.training.metrics import read_metrics
from tests.report.test_report import report
from tests.world import options, run, train_command

WORSE_AFTER_4 = {0: 0.9, 2: 0.5, 4: 0.3, 6: 0.4, 8: math.nan, 10: 0.3, 12: 0.1}


@pytest.fixture
def scripted(monkeypatch):
    """Gives evaluations scripted losses, by step; everything else is unchanged."""

    def follow(script, name="eval_loss"):
        real = Evaluator.evaluate

        def evaluate(self, engine, step, **more):
            return {**real(self, engine, step, **more), name: float(script[step])}

        monkeypatch.setattr(Evaluator, "evaluate", evaluate)

    return follow


@pytest.fixture
def stopped_at(monkeypatch):
    """Acts as if SIGTERM arrived during this step: sets what the signal handler sets, which no test process installs."""

    def stop(number):
        real = loop.train_step

        def step(run, batch):
            if run.state.step + 1 == number:
                run.stopper.reason = "SIGTERM"
            return real(run, batch)

        monkeypatch.setattr(loop, "train_step", step)

    return stop


def settings(world, folder, **more):
    common = {
        "max_steps": 12,
        "eval_split": 0.25,
        "eval_steps": 2,
        "num_eval_captions": 0,
        "gradient_accumulation_steps": 1,
    }
    return options(world, folder, **{**common, "save_steps": 0, "early_stopping_patience": 3, **more})


def kept_state(folder):
    newest = list_checkpoints(folder)[-1]
    return json.loads((newest / "state" / "trainer.json").read_text())["state"]


def names(folder):
    return [each.name for each in list_checkpoints(folder)]


@given(
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 0.5, 0.5000001, 1.0, -2.0, None]), max_size=9),
    st.booleans(),
)
def test_the_best_is_the_first_of_the_extreme_finite_numbers(values, greater):
    best = BestSoFar(metric="eval_x", greater_is_better=greater)
    best.record(7.0, 0)  # before training: kept, not counted
    improved = [best.record(value, step) for step, value in enumerate(values, 1)]
    finite = [(value, -step) for step, value in enumerate(values, 1) if value is not None and math.isfinite(value)]
    if not finite:
        assert best.value is None and best.without_improvement == len(values) and not any(improved)
        return
    extreme = (max if greater else min)(value for value, _ in finite)
    first = min(-step for value, step in finite if value == extreme)
    assert (best.value, best.step) == (extreme, first)
    assert best.without_improvement == len(values) - first and improved[first - 1] and not any(improved[first:])


def test_a_run_that_gets_worse_stops_and_leaves_its_best_model(world, tmp_path, in_one_process, scripted, capsys):
    scripted(WORSE_AFTER_4)
    folder = tmp_path / "out"
    values = settings(world, folder, load_best_model_at_end=True, save_total_limit=1, logging_steps=4)
    state = in_one_process(values)
    # 0.3 is reached at step 4; 0.4, nan and a tie are three evaluations without improvement.
    assert (state.step, state.best.step, state.best.value, state.best.without_improvement) == (10, 4, 0.3, 3)
    assert names(folder) == ["checkpoint-000004", "checkpoint-000010"]
    said = capsys.readouterr().err
    assert "best so far: eval_loss 0.3 at step 4" in said
    assert "no improvement in 2 evaluations: eval_loss 0.3 at step 4" in said
    assert "no improvement in 3 evaluations: stopped early at step 10 of 12; checkpoint: " in said
    assert f"best model: in {folder}, a copy of checkpoint-000004" in said
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 10]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4, 6, 8, 10]
    # The model in the output folder is that of the best checkpoint, and loads as peft and the trainer's tools load one.
    best, last = (load_file(folder / name / "adapter_model.safetensors") for name in names(folder))
    top = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(top[name], best[name]) for name in best) and set(top) == set(best)
    assert any(not torch.equal(best[name], last[name]) for name in best)
    from synpo_fast.cli import main

    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    assert {"step": 4, "metric": "eval_loss", "value": 0.3}.items() <= json.loads(
        (folder / "best_model.json").read_text()
    ).items()
    text = report(folder).text
    assert (
        "Best evaluation: eval_loss 0.3 (synpo loss) at step 4, before training 0.9. Its model is in the output folder."
        in text
    )
    assert "Early stopping ended the run: 3 evaluations in a row were no better." in text and "SIGTERM" not in text
    _a_second_start_has_nothing_to_do(values, folder, in_one_process, capsys)


def _a_second_start_has_nothing_to_do(values, folder, in_one_process, capsys):
    (folder / "adapter_model.safetensors").unlink()  # as if the first start had been killed before it was copied
    state = in_one_process({**values, "resume": "auto"})
    assert state.step == 10 and "nothing to do: the run stopped early" in capsys.readouterr().err
    assert (folder / "adapter_model.safetensors").exists()
    state = in_one_process({**values, "resume": "auto", "early_stopping_patience": 4})
    assert (state.step, state.best.step, state.best.value) == (12, 12, 0.1)
    assert json.loads((folder / "best_model.json").read_text())["step"] == 12
    assert names(folder) == ["checkpoint-000012"]


@pytest.mark.parametrize(
    "stop", [4, 5, 8]
)  # where the best is evaluated, between evaluations, at one without improvement
def test_a_resumed_run_judges_as_the_uninterrupted_one(world, tmp_path, in_one_process, scripted, stopped_at, stop):
    scripted(WORSE_AFTER_4)
    more = {"load_best_model_at_end": True, "lora_dropout": 0.1}
    in_one_process(settings(world, tmp_path / "whole", **more))
    stopped_at(stop)
    state = in_one_process(settings(world, tmp_path / "parts", **more))
    assert state.stopped_early and state.step == stop and not (tmp_path / "parts" / "best_model.json").exists()
    in_one_process(settings(world, tmp_path / "parts", **more, resume="auto"))
    assert kept_state(tmp_path / "parts") == kept_state(tmp_path / "whole")
    for name in ("best_model.json", "adapter_model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    evaluated = [
        sorted(row["step"] for row in read_metrics(tmp_path / part / "metrics.jsonl") if "eval_loss" in row)
        for part in ("whole", "parts")
    ]
    assert evaluated[0] == evaluated[1] == [0, 2, 4, 6, 8, 10]


def test_a_stop_in_the_last_step_leaves_its_evaluation_to_the_resumed_run(
    world, tmp_path, in_one_process, scripted, stopped_at
):
    scripted({0: 1.0, 2: 0.5, 4: 0.2})
    stopped_at(4)
    values = settings(world, tmp_path, max_steps=4, load_best_model_at_end=True)
    in_one_process(values)
    assert json.loads((tmp_path / "best_model.json").read_text())["step"] == 2
    state = in_one_process({**values, "resume": "auto"})
    assert (state.step, state.best.step) == (4, 4)
    assert json.loads((tmp_path / "best_model.json").read_text())["step"] == 4
    assert kept_state(tmp_path)["best"]["step"] == 4 and not kept_state(tmp_path)["evaluation_due"]


def test_a_metric_that_is_to_grow_and_a_real_evaluation(world, tmp_path, in_one_process):
    """Held-out pairs with their responses exchanged: what training learns makes these worse."""
    swapped = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in read_manifest(world / "pairs.jsonl")
    ]
    write_manifest(world / "swapped.jsonl", swapped)
    values = settings(
        world, tmp_path, eval_split=0.0, eval_file=str(world / "swapped.jsonl"), load_best_model_at_end=True,
        metric_for_best_model="rewards/margins", early_stopping_patience=2, max_grad_norm=1.0, warmup_ratio=0.0,
    )  # fmt: skip
    state = in_one_process(values)
    rows = [
        row for row in read_metrics(tmp_path / "metrics.jsonl") if "eval_rewards/margins" in row and row["step"] > 0
    ]
    margins = {row["step"]: row["eval_rewards/margins"] for row in rows}
    expected = max(margins, key=lambda step: (margins[step], -step))
    assert (state.best.step, state.best.value) == (expected, margins[expected]) and state.best.greater_is_better
    assert state.step == expected + 4 == max(margins) < 12
    assert "no worse" in state.best.description()  # before training it was better, and the last line says so


def test_what_another_start_compares_is_compared_anew(world, tmp_path, in_one_process, scripted, stopped_at, capsys):
    scripted(WORSE_AFTER_4)
    stopped_at(7)
    values = settings(world, tmp_path, load_best_model_at_end=True)
    in_one_process(values)
    capsys.readouterr()
    saved = shutil.copytree(tmp_path, tmp_path.with_name("saved"))
    state = in_one_process({**values, "resume": "auto", "metric_for_best_model": "eval_nll_loss"})
    said = capsys.readouterr().err
    assert "evaluations are compared anew: by the least eval_nll_loss, until now by the least eval_loss" in said
    assert state.best.metric == "eval_nll_loss" and state.best.step >= 8
    shutil.rmtree(saved / "checkpoint-000004")
    state = in_one_process({**values, "output_dir": str(saved), "resume": "auto"})
    assert "checkpoint-000004, the best of them so far, is not there" in capsys.readouterr().err
    assert (state.step, state.best.step) == (12, 12)


def test_early_stopping_alone_keeps_no_checkpoint(world, tmp_path, in_one_process, scripted):
    scripted(WORSE_AFTER_4)
    state = in_one_process(settings(world, tmp_path, early_stopping_patience=1))
    assert state.step == 6 and names(tmp_path) == ["checkpoint-000006"] and not (tmp_path / "best_model.json").exists()


NEEDED = {"model_name_or_path": "tiny:text", "train_file": "pairs.jsonl", "output_dir": "out"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end compares evaluations, which need held-out pairs"),
        ({"early_stopping_patience": 2}, "early_stopping_patience .* held-out pairs: give eval_file or"),
        ({"load_best_model_at_end": True, "eval_split": 0.1}, "eval_steps=0 evaluates only at the end: set eval_steps"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0, expected"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model has no effect without load_best_model_at_end or"),
        ({"greater_is_better": False}, "greater_is_better has no effect without"),
        (
            {"early_stopping_patience": 1, "eval_split": 0.1, "eval_steps": 1, "metric_for_best_model": "accuracy"},
            "metric_for_best_model is 'accuracy', expected a number that evaluation of loss_type=synpo writes: loss, rewards/",
        ),
        (
            {
                "early_stopping_patience": 1, "eval_split": 0.1, "eval_steps": 1, "loss_type": "sft",
                "metric_for_best_model": "rewards/accuracies",
            },
            "evaluation of loss_type=sft writes: loss, nll_loss, mean_token_accuracy, entropy$",
        ),
    ],
)  # fmt: skip
def test_contradictions_are_errors_at_the_start(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**NEEDED, **values)


@pytest.mark.parametrize(
    ("metric", "greater", "expected"),
    [
        (None, None, ("eval_loss", False)),
        ("eval_nll_loss", None, ("eval_nll_loss", False)),
        ("rewards/accuracies", None, ("eval_rewards/accuracies", True)),
        ("rewards/rejected", False, ("eval_rewards/rejected", False)),
    ],
)
def test_names_and_directions_are_hugging_faces(metric, greater, expected):
    config = TrainConfig(
        **NEEDED, eval_split=0.1, eval_steps=1, early_stopping_patience=1, metric_for_best_model=metric,
        greater_is_better=greater,
    )  # fmt: skip
    assert (config.best_metric, config.best_is_greater) == expected


@pytest.mark.parametrize("loss_type", ["synpo", "sft", "kto"])
def test_the_names_that_are_taken_are_those_that_evaluation_writes(world, tmp_path, in_one_process, loss_type):
    values = settings(world, tmp_path, max_steps=1, loss_type=loss_type, early_stopping_patience=None)
    in_one_process(values)
    written = {name for row in read_metrics(tmp_path / "metrics.jsonl") for name in row if name.startswith("eval_")}
    with pytest.raises(ValueError, match="expected a number") as error:
        TrainConfig(**{**values, "early_stopping_patience": 1, "metric_for_best_model": "other"})
    offered = str(error.value).split("writes: ")[1].split(", ")
    assert {f"eval_{name}" for name in offered} == written - {"eval_skipped_pairs"}


def test_held_out_pairs_that_compare_nothing(world, tmp_path, in_one_process):
    pairs = [replace(pair, loss="sft", rejected="") for pair in read_manifest(world / "pairs.jsonl")]
    write_manifest(world / "supervised.jsonl", pairs)
    values = settings(world, tmp_path, eval_split=0.0, eval_file=str(world / "supervised.jsonl"))
    with pytest.raises(ValueError, match=r'rewards/accuracies compares .* every held-out pair has "loss": "sft"'):
        in_one_process({**values, "metric_for_best_model": "rewards/accuracies"})


@pytest.mark.parametrize(
    ("keep", "best", "expected"),
    [(2, 1, [1, 6]), (1, 1, [1, 6]), (3, 1, [1, 5, 6]), (2, None, [5, 6]), (None, 3, None)],
)
def test_the_best_checkpoint_is_never_deleted(tmp_path, keep, best, expected):
    """The best one counts towards save_total_limit, as in Hugging Face's trainer; only a limit of 1 keeps both."""
    for step in range(1, 7):
        write_checkpoint(
            tmp_path,
            step,
            save_model=lambda folder: (folder / "model.safetensors").write_text("w"),
            optimizer_state={"x": torch.zeros(1)},
            trainer_state={"state": {"step": step}},
            keep=keep,
            best=best if best is not None and step >= best else None,
        )
    assert names(tmp_path) == [f"checkpoint-{step:06d}" for step in expected or range(1, 7)]


def checkpoint_with(folder, step, text, *more):
    def save(place):
        for name in ("adapter_model.safetensors", "README.md", *more):
            (place / name).write_text(text)

    return write_checkpoint(
        folder,
        step,
        save_model=save,
        optimizer_state={"x": torch.zeros(1)},
        trainer_state={"state": {"step": step}},
        keep=None,
    )


def test_only_what_was_put_there_is_replaced_or_removed(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    first = checkpoint_with(tmp_path, 1, "one", "old.txt")
    check_top_is_free(tmp_path, may_replace=False)
    copy_best(tmp_path, first, {"step": 1})
    assert (tmp_path / "adapter_model.safetensors").read_text() == (tmp_path / "old.txt").read_text() == "one"
    copy_best(tmp_path, checkpoint_with(tmp_path, 2, "two"), {"step": 2})
    assert (tmp_path / "adapter_model.safetensors").read_text() == "two" and not (tmp_path / "old.txt").exists()
    check_top_is_free(tmp_path, may_replace=True)
    with pytest.raises(ValueError, match="holds the best model of an earlier run"):
        check_top_is_free(tmp_path, may_replace=False)
    with pytest.raises(
        CheckpointError, match=r"holds notes.txt, which this run did not write: the best model stays in"
    ):
        copy_best(tmp_path, checkpoint_with(tmp_path, 3, "three", "notes.txt"), {"step": 3})
    assert (tmp_path / "adapter_model.safetensors").read_text() == "two"
    remove_best(tmp_path)
    left = sorted(file.name for file in tmp_path.iterdir() if file.is_file())
    assert left == ["README.md", "notes.txt"] and (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "best_model.json").write_text(json.dumps({"files": ["../outside", "/etc/passwd", 3, "..", "sub/x"]}))
    (tmp_path.parent / "outside").write_text("safe")
    remove_best(tmp_path)
    assert (tmp_path.parent / "outside").exists()


def test_a_broken_best_checkpoint_is_said(tmp_path):
    checkpoint = checkpoint_with(tmp_path, 1, "one")
    (checkpoint / "adapter_model.safetensors").write_text("cut")
    with pytest.raises(CheckpointError, match=r"the best model cannot be taken from .*adapter_model.safetensors"):
        copy_best(tmp_path, checkpoint, {"step": 1})
    with pytest.raises(CheckpointError, match="there is no such folder"):
        copy_best(tmp_path, tmp_path / "checkpoint-000009", {"step": 9})
    assert not (tmp_path / "best_model.json").exists()


def test_a_folder_that_holds_a_model_is_refused_before_training(world, tmp_path, in_one_process):
    (tmp_path / "model.safetensors").write_text("the base model")
    values = settings(world, tmp_path, load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"holds a model \(model.safetensors\)"):
        in_one_process(values)
    assert (tmp_path / "model.safetensors").read_text() == "the base model" and not list_checkpoints(tmp_path)


def best_at(step, value=0.5, **more):
    return BestSoFar(metric="eval_loss", value=value, step=step, without_improvement=1, **more)


def comparing(folder, **more):
    values = {"eval_split": 0.1, "eval_steps": 1, "load_best_model_at_end": True, **more}
    return TrainConfig(**{**NEEDED, "output_dir": str(folder)}, **values)


def top_of(folder):
    return (folder / "adapter_model.safetensors").read_text()


def test_a_best_model_whose_checkpoint_is_gone_stays_the_best(tmp_path, group):
    first, config = best_at(1), comparing(tmp_path)
    copy_best(tmp_path, checkpoint_with(tmp_path, 1, "one"), first.facts)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    best, said = resumed_best(first, config)
    assert (best.step, best.value) == (1, 0.5) and "its copy in" in said[0] and "stays the best" in said[0]
    assert not best.record(0.6, 2)  # a worse one does not take its place
    assert copy_best(tmp_path, tmp_path / "checkpoint-000001", best.facts) is None and top_of(tmp_path) == "one"
    assert best.record(0.4, 3) and not best.copied
    aside = copy_best(tmp_path, checkpoint_with(tmp_path, 3, "three"), best.facts)
    assert top_of(tmp_path) == "three" and aside == tmp_path / "superseded" / "best_model-000001"
    # As a folder that loads, and that says what it is.
    assert top_of(aside) == "one" and copies_are_intact(aside, first.facts)


@pytest.mark.parametrize("harm", ["changed", "another value", "of an earlier version"])
def test_a_copy_that_is_not_known_to_be_the_best_is_moved_and_not_replaced(tmp_path, group, harm):
    first = best_at(1)
    copy_best(tmp_path, checkpoint_with(tmp_path, 1, "one"), first.facts)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    if harm == "changed":
        (tmp_path / "adapter_model.safetensors").write_text("own")
    elif harm == "another value":
        first = best_at(1, 0.7)
    else:
        found = json.loads((tmp_path / "best_model.json").read_text())
        del found["sealed"], found["greater_is_better"]
        (tmp_path / "best_model.json").write_text(json.dumps(found))
    text = top_of(tmp_path)
    best, said = resumed_best(first, comparing(tmp_path))
    assert best.value is None and "compared anew" in said[0] and "is not there" in said[0]
    best.record(0.9, 2)
    aside = copy_best(tmp_path, checkpoint_with(tmp_path, 2, "two"), best.facts)
    assert top_of(aside) == text and top_of(tmp_path) == "two"


def test_the_best_under_another_rule_is_kept(tmp_path, group):
    """Its checkpoint is kept until the model also exists elsewhere; its copy is moved to superseded/."""
    first, rule = best_at(1), comparing(tmp_path, metric_for_best_model="nll_loss")
    folder = checkpoint_with(tmp_path, 1, "one")
    best, _ = resumed_best(first, rule)
    assert best.value is None and best.earlier == [1]
    best.record(0.2, 2)
    for step in (2, 3, 4):
        write_step(tmp_path, step, keep=1, best=best.step, earlier_bests=best.earlier)
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002", "checkpoint-000004"]
    again, _ = resumed_best(best, rule)
    assert again.step == 2 and again.earlier == [1]
    # The same with its copy at the top, which another rule's best replaces although the checkpoint is there.
    copy_best(tmp_path, folder, first.facts)
    assert is_stored_elsewhere(tmp_path, folder) and resumed_best(first, rule)[0].earlier == []
    aside = copy_best(tmp_path, tmp_path / "checkpoint-000002", best.facts)
    assert aside is not None and top_of(aside) == "one"
    assert is_stored_elsewhere(tmp_path, folder) and resumed_best(best, rule)[0].earlier == []
    (aside / "adapter_model.safetensors").write_text("eno")
    assert not is_stored_elsewhere(tmp_path, folder)


def write_step(folder, step, **more):
    return write_checkpoint(
        folder, step, save_model=lambda place: (place / "adapter_model.safetensors").write_text(f"w{step}"),
        optimizer_state={"x": torch.zeros(1)}, trainer_state={"state": {"step": step}}, **more,
    )  # fmt: skip


def test_a_kill_while_an_earlier_best_model_is_moved_leaves_all_of_it(tmp_path, monkeypatch):
    first, second = best_at(1), best_at(2, 0.4)
    copy_best(tmp_path, checkpoint_with(tmp_path, 1, "one", "config.json", "tokenizer.json"), first.facts)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    checkpoint = checkpoint_with(tmp_path, 2, "two", "config.json", "tokenizer.json")
    real, aside = Path.replace, None
    for most in range(12):
        left = [most]

        def replace_some(path, target, left=left):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replace_some)
        try:
            aside = copy_best(tmp_path, checkpoint, second.facts) or aside
        except KeyboardInterrupt:
            continue
        break
    places = list((tmp_path / "superseded").iterdir())
    assert [place.name for place in places] == ["best_model-000001"] and copies_are_intact(places[0], first.facts)
    assert copies_are_intact(tmp_path, second.facts) and not (tmp_path / "best_model.json.earlier").exists()


def test_a_broken_best_checkpoint_is_noticed_at_the_start(tmp_path, group):
    first, config = best_at(1), comparing(tmp_path)
    folder = checkpoint_with(tmp_path, 1, "one")
    assert resumed_best(first, config) == (first, [])
    (folder / "adapter_model.safetensors").write_text("eno")  # the same size
    best, said = resumed_best(first, config)
    assert best.value is None and best.step == 0
    assert "evaluations are compared anew" in said[0] and "adapter_model.safetensors has other bytes" in said[0]
    assert best.description() == "eval_loss was compared in no evaluation"
    (folder / "adapter_model.safetensors").write_text("one")
    copy_best(tmp_path, folder, first.facts)
    (folder / "adapter_model.safetensors").write_text("eno")
    best, said = resumed_best(first, config)
    assert best.copied and best.step == 1 and "is broken" in said[0] and "stays the best" in said[0]


def test_a_broken_best_checkpoint_costs_no_whole_one(tmp_path):
    for step in (1, 2, 3):
        write_step(tmp_path, step, keep=2, best=1)
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000003"]
    (tmp_path / "checkpoint-000001" / "adapter_model.safetensors").write_text("w")
    write_step(tmp_path, 4, keep=2, best=1)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]


def test_a_best_model_that_cannot_be_copied_leaves_the_report(world, tmp_path, in_one_process, monkeypatch):
    """The best checkpoint is damaged in the last steps; the next start reports it and succeeds."""
    values = settings(world, tmp_path, max_steps=4, load_best_model_at_end=True, eval_steps=1, eval_on_start=False)
    real = start._copy_best

    def damaged_first(run):
        (tmp_path / f"checkpoint-{run.state.best.step:06d}" / "adapter_model.safetensors").write_text("cut")
        return real(run)

    monkeypatch.setattr(start, "_copy_best", damaged_first)
    with pytest.raises(CheckpointError, match=r"cannot be taken from .* start again with --resume auto"):
        in_one_process(values)
    assert (tmp_path / "report.html").exists() and not (tmp_path / "best_model.json").exists()


@pytest.mark.parametrize("adapter", [True, False])
def test_the_names_that_are_looked_for_are_those_that_are_written(world, tmp_path, adapter):
    policy, source = load_policy("tiny:qwen2_5_vl"), str(world / "base")
    expected = names_beside_weights(policy, adapter=adapter, source=source)
    if adapter:
        add_lora(policy, r=2, alpha=2, dropout=0.0, targets=("q_proj",))
    weights = {f"policy.model.{name}": value.detach() for name, value in policy.model.named_parameters()}
    trained = {name: value for name, value in weights.items() if "lora_" in name}
    save_model_files(policy, tmp_path, trained if adapter else weights, adapter=adapter, source=source)
    written = {file.name for file in tmp_path.iterdir() if file.is_file() and file.name != "README.md"}
    assert {name for name in written if not name.endswith(".safetensors")} == expected


def test_a_file_of_the_users_that_the_best_model_would_need_is_said_before_training(world, tmp_path, in_one_process):
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(
        ValueError, match=r"holds tokenizer.json, and load_best_model_at_end puts files of that name there"
    ):
        in_one_process(settings(world, tmp_path, load_best_model_at_end=True))
    assert (tmp_path / "tokenizer.json").read_text() == "mine" and not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.heavy
def test_two_ranks_stop_together(world, tmp_path, port):
    swapped = [
        replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in read_manifest(world / "pairs.jsonl")
    ]
    write_manifest(world / "swapped.jsonl", swapped)
    values = settings(
        world, tmp_path, eval_split=0.0, eval_file=str(world / "swapped.jsonl"), load_best_model_at_end=True,
        metric_for_best_model="rewards/margins", early_stopping_patience=2, max_grad_norm=1.0, warmup_ratio=0.0,
    )  # fmt: skip
    done = run(train_command(values, num_ranks=2, port=port))
    assert done.returncode == 0, done.stderr[-2000:]
    best = json.loads((tmp_path / "best_model.json").read_text())["step"]
    assert f"stopped early at step {best + 4} of 12" in done.stderr


def test_every_rank_judges_the_number_of_the_first(monkeypatch):
    """This rank's value differs in its last bit, or is missing: only rank 0's value counts."""
    monkeypatch.setattr("synpo_fast.training.best_model.dist.broadcast", lambda value, src: value.fill_(0.25))
    for own in ({"eval_loss": 0.75}, {"eval_loss": math.nan}, {}):
        best = BestSoFar(metric="eval_loss", value=0.5, step=1)
        assert judge(best, own, 2, torch.device("cpu")) == (True, "best so far: eval_loss 0.25 at step 2")
        assert (best.value, best.step) == (0.25, 2)


@pytest.mark.parametrize(
    "content",
    [b"", b"u\n", b"hello, this is a text\n", b"\0" * 500, bytes(range(256)), pickle.dumps([1]), torch.zeros(2),
     [1, 2], 5, {"a": 1}, {"weights": "key"}, {"weights": "key", "entries": 3}],
)  # fmt: skip
def test_reference_logps_that_cannot_be_read_are_made_again(tmp_path, content, caplog):
    file = tmp_path / "reference.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert not is_fresh(file, "key")
    assert all("\n" not in record.getMessage() for record in caplog.records)
    torch.save({"weights": "key", "entries": {}}, file)
    assert is_fresh(file, "key") and not is_fresh(file, "another")
