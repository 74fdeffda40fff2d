"""A run that continues with other options: changes are printed; another dtype or stage continues from the same fp32 weights."""

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.run_folder.start_choice import what_changed
from synpo_fast.training.metrics import read_metrics
from tests.world import options

SMALL = {"max_steps": 3, "save_steps": 3, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}


def masters(checkpoint):
    state = load_file(checkpoint / "state" / "optimizer.safetensors")
    return {name: value for name, value in state.items() if name.endswith(".master")}


def test_what_changed_is_said_in_a_line_each(world, tmp_path, in_one_process, capfd):
    values = options(world, tmp_path / "run", **SMALL)
    in_one_process(values)
    capfd.readouterr()
    more = {"learning_rate": 2e-3, "lr_scheduler_type": "cosine", "max_steps": 4, "bf16": True, "resume": "auto"}
    in_one_process({**values, **more})
    said = capfd.readouterr().err.splitlines()
    assert {line for line in said if line.startswith("changed: ")} == {
        "changed: learning_rate was 0.001, is 0.002",
        'changed: lr_scheduler_type was "linear", is "cosine"',
        "changed: max_steps was 3, is 4",
        "changed: bf16 was null, is true",
        "changed: dtype was float32, is bfloat16",
    }
    assert "the earlier config.yaml is now config.until-step-3.yaml" in said
    assert "learning_rate: 0.001" in (tmp_path / "run" / "config.until-step-3.yaml").read_text()
    in_one_process({**values, **more})
    assert not [line for line in capfd.readouterr().err.splitlines() if line.startswith("changed: ")]


def test_an_earlier_config_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "new.yaml").write_text("beta: 1\nalpha: 2\n")
    assert what_changed(tmp_path / "none.yaml", tmp_path / "new.yaml")[0].startswith("the options that changed")
    (tmp_path / "old.yaml").write_text("beta: 1\nalpha: 3\ngone: 5\n")
    assert what_changed(tmp_path / "old.yaml", tmp_path / "new.yaml") == ["changed: alpha was 3, is 2"]


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, True), (0, False)), ((0, False), (1, True)), ((3, True), (2, False)), ((1, False), (3, True))],
    ids=["bf16-2 to fp32-0", "fp32-0 to bf16-1", "bf16-3 to fp32-2", "fp32-1 to bf16-3"],
)
def test_another_dtype_goes_on_from_the_same_weights(world, tmp_path, in_one_process, before, after, use_peft):
    """Rate 0: what the second run saves is what it began with, bit for bit, moments apart."""
    values = options(world, tmp_path / "run", **SMALL, use_peft=use_peft)
    in_one_process({**values, "zero_stage": before[0], "bf16": before[1], "learning_rate": 1e-3})
    first = masters(tmp_path / "run" / "checkpoint-000003")
    assert first and all(value.dtype == torch.float32 for value in first.values())
    if before[1]:
        assert any((value != value.bfloat16().float()).any() for value in first.values())
    later = {"zero_stage": after[0], "bf16": after[1], "learning_rate": 1e-30, "weight_decay": 0.0, "max_steps": 4}
    in_one_process({**values, **later, "resume": "auto"})
    second = masters(tmp_path / "run" / "checkpoint-000004")
    assert set(second) == set(first)
    assert all(torch.equal(second[name], first[name]) for name in first)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] is not None


def test_a_run_back_and_forth_between_dtypes_trains(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "run", **SMALL)
    for steps, bf16 in ((3, True), (6, False), (9, True)):
        state = in_one_process({**values, "max_steps": steps, "bf16": bf16, "resume": "auto"})
        assert (state.step, state.nonfinite_steps) == (steps, 0)


def test_what_must_not_change_is_refused(world, tmp_path, in_one_process):
    values = options(world, tmp_path / "run", **SMALL, model_name_or_path="tiny:qwen2_5_vl")
    values["model_options"] = {"hidden_size": 64}
    in_one_process(values)
    with pytest.raises(ValueError, match="hidden_size was 64, now 32"):
        in_one_process({**values, "model_options": {"hidden_size": 32}, "resume": "auto"})


def test_a_checkpoint_of_an_earlier_version_says_why_it_cannot_go_on_in_bf16(world, tmp_path, in_one_process):
    from safetensors.torch import save_file

    from synpo_fast.run_folder.checkpoint import _write_digests

    values = options(world, tmp_path / "run", **SMALL)
    in_one_process(values)
    checkpoint = tmp_path / "run" / "checkpoint-000003"
    file = checkpoint / "state" / "optimizer.safetensors"
    save_file({name: value for name, value in load_file(file).items() if not name.endswith(".master")}, file)
    (checkpoint / "complete.json").unlink()
    _write_digests(checkpoint)
    with pytest.raises(ValueError, match=r"holds no fp32 weights .* resume in fp32"):
        in_one_process({**values, "bf16": True, "resume": "auto", "max_steps": 4})
    assert in_one_process({**values, "resume": "auto", "max_steps": 4}).step == 4
