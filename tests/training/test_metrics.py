"""The metrics of a run: those shown while it trains, and those written to files."""

import json
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.terminal.progress import Progress
from synpo_fast.training.metrics import MetricsLog, Window, means_of, read_metrics
from tests.world import options


def log_of(folder, first_step=1, **more):
    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir=str(folder), **more)
    log = MetricsLog(folder, config, first_step=first_step)
    log.open()
    return log


def test_rows_are_appended_and_a_last_one_that_is_cut_off_is_left_out(tmp_path):
    for steps in ((1, 2), (3,)):
        log = log_of(tmp_path)
        for step in steps:
            log.log(step, {"loss": step / 10})
        log.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed while writing
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_values_that_are_not_finite_are_null_in_json(tmp_path):
    log = log_of(tmp_path)
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-5})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": None, "grad_norm": None, "learning_rate": 1e-5
    }  # fmt: skip


def test_a_window_gives_means_and_what_stands_last(tmp_path):
    window = Window()
    for step, loss in enumerate((1.0, math.nan, 4.0, math.inf), 1):
        window.add(
            {"loss": loss, "num_tokens": 10 * step, "grad_norm": math.inf, "pairs_per_s": 8 / step, "step_s": step}
        )
        window = Window(**json.loads(json.dumps(asdict(window))))  # as a checkpoint keeps it
    window.add({"loss": 1.0, "num_tokens": 50, "diagnosis": 3.0, "pairs_per_s": 0.0, "step_s": 6.0})
    means = window.take()
    assert math.isnan(means.pop("grad_norm"))
    # 8 pairs in each of the first four steps, none in the last, in 16 seconds
    assert means == {"loss": 2.0, "num_tokens": 50, "diagnosis": 3.0, "pairs_per_s": 2.0, "step_s": 3.2}
    assert window.take() == {}


def test_a_resumed_run_is_the_same_run_at_wandb(tmp_path, monkeypatch):
    begun = []
    fake = SimpleNamespace(init=lambda **given: begun.append(given) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (0, 4, 0):
        log_of(tmp_path, first_step=first_step, report_to=("wandb",), run_name="mine").close()
    new, resumed, anew = (given["id"] for given in begun)
    assert new == resumed != anew
    assert all(given["resume"] == "allow" and given["name"] == "mine" for given in begun)


def test_an_identifier_of_wandbs_own_is_kept(tmp_path, monkeypatch):
    begun = []
    fake = SimpleNamespace(init=lambda **given: begun.append(given) or SimpleNamespace(finish=lambda: None))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    log_of(tmp_path, first_step=0, report_to=("wandb",)).close()
    assert begun[0]["id"] == "given"


def test_a_line_broken_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = log_of(tmp_path, report_to=("tensorboard",))
    log.log(3, {"loss": 0.5, "rewards/margins": 0.25, "eval_loss": 0.75, "eval_captions": [{"id": "a"}]})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"train/loss": [(3, 0.5)], "rewards/margins": [(3, 0.25)], "eval/loss": [(3, 0.75)]}


def test_means_of_nothing_are_nothing():
    assert means_of({}) == {} and means_of({"pairs": 0.0}) == {}


def test_a_run_logs_trl_names_evaluates_and_writes_captions(world, tmp_path, in_one_process, capsys):
    values = options(
        world, tmp_path / "out", max_steps=4, eval_steps=2, eval_split=0.25, num_eval_captions=2, max_new_tokens=6,
        diagnostics=2, max_batch_tokens=150, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    )  # fmt: skip
    in_one_process(values)
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    for name in (
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
        "nll_loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "pairs_per_s", "data_wait_share",
    ):  # fmt: skip
        assert all(isinstance(row[name], (int, float)) for row in steps), name
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "diagnostics/grad_norm_chosen" in row] == [1, 3]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert (tmp_path / "out" / "report.html").stat().st_size > 1000
    captions = evaluations[0]["eval_captions"]
    assert len(captions) == 2 and all({"id", "caption", "chosen", "rejected", "prompt"} <= set(row) for row in captions)
    shown = capsys.readouterr().err
    assert "step 4/4" in shown and "evaluation:" in shown and "finished at step 4 of 4" in shown


def test_evaluation_is_the_same_on_a_second_look_and_leaves_training_alone(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "a", max_steps=3, eval_split=0.25, lora_dropout=0.3, num_eval_captions=0)
    in_one_process({**values, "eval_steps": 1})
    in_one_process({**values, "output_dir": str(tmp_path / "b"), "eval_steps": 0})
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("a", "b")
    ]
    assert losses[0] == losses[1]


def test_progress_for_files_has_a_line_a_step(capsys):
    progress = Progress(shows=True, bar=True, first_step=2, num_steps=4, every=1)
    progress.show(3, {"loss": 0.123456, "rewards/margins": 1.0, "pairs_per_s": 2.0})
    progress.show(4, {"loss": 0.1})
    progress.note({"eval_loss": 0.5, "eval_captions": [{"id": "a", "caption": "text"}]})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 3/4  loss 0.1235  margins 1") and "left ?" in lines[0]
    assert lines[1].endswith("left 0:00")
    assert lines[2] == "evaluation: eval_loss 0.5" and lines[3] == "  a: text"
    Progress(shows=False, bar=True, first_step=0, num_steps=1, every=1).show(1, {"loss": 1.0})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("loss_type", ["synpo", "simpo", "cpo", "sft,ipo"])
def test_diagnostics_are_the_gradients_of_the_mean_rewards(world, group, loss_type):
    """Compares with autograd on the mean reward of all pairs at once, each response in a row of its own."""
    from synpo_fast.data import read_manifest
    from synpo_fast.models import load_policy
    from synpo_fast.references import FrozenCopy
    from synpo_fast.scoring import PairEncoder
    from synpo_fast.training.pair_module import PairModule
    from synpo_fast.training.reward_gradients import reward_gradient_norms

    policy = load_policy("tiny:text", device="cpu")
    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_peft=False, loss_type=loss_type)
    encoder = PairEncoder.of(policy)
    texts = read_manifest(world / "pairs.jsonl")[:3]
    pairs = [encoder(type(pair)(pair.prompt, pair.chosen, pair.rejected, id=pair.id), None) for pair in texts]
    module = PairModule(policy, config)
    if config.needs_reference:
        module.reference = FrozenCopy(policy)
    reward_of = {  # with the default beta of each; the reference's log-probs have no gradient
        "synpo": lambda logps: logps.mean().exp(),
        "simpo": lambda logps: 2.0 * logps.mean(),
        "cpo": lambda logps: 0.1 * logps.sum(),
        "sft,ipo": lambda logps: 0.1 * logps.sum(),
    }[loss_type]
    found = reward_gradient_norms(module, [pairs[:2], pairs[2:]])
    trained = [p for p in module.parameters() if p.requires_grad]
    logps = policy([pair.sample for pair in pairs], share_prefix=False, pack=False)
    for which, name in enumerate(("chosen", "rejected")):
        reward = torch.stack([reward_of(each[which]) for each in logps]).mean()
        gradients = torch.autograd.grad(reward, trained, retain_graph=True, allow_unused=True)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
        size = sum(p.numel() for p in trained)
        assert found[f"diagnostics/grad_norm_{name}"] == pytest.approx(norm / size, rel=1e-4)
        mean = sum(each[which].mean().item() for each in logps) / 3
        assert found[f"diagnostics/logps_mean/{name}"] == pytest.approx(mean, rel=1e-5)
