"""A device that runs out of memory: the message, and steps that leave out pairs that do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data import read_manifest, write_manifest
from synpo_fast.errors import UserError
from synpo_fast.run_folder.checkpoint import newest_checkpoint
from synpo_fast.training.loop import TrainingStopped
from synpo_fast.training.metrics import read_metrics
from synpo_fast.training.pair_module import PairModule
from synpo_fast.training.run_model import checkpoints_activations
from tests.world import options, run, train_command


class BreaksOff(torch.autograd.Function):
    """Returns its input in the forward, and runs out of memory in the backward."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def run_out(monkeypatch, names, where):
    """Makes the pairs of these names run out of memory: in the forward, or after half of the layers' backward."""
    original = PairModule.forward

    def forward(self, pairs, scale):
        hit = bool(names & {pair.id for pair in pairs})
        if hit and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        layers = self.policy.family.language_model(self.policy.base).layers
        hook = None
        if hit:
            hook = layers[0].register_forward_hook(
                lambda module, given, out: (
                    BreaksOff.apply(out) if torch.is_tensor(out) else (BreaksOff.apply(out[0]), *out[1:])
                )
            )
        try:
            return original(self, pairs, scale)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(PairModule, "forward", forward)


def test_a_gpu_recomputes_activations_unless_told_not_to():
    def of(value):
        return TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", gradient_checkpointing=value)

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert checkpoints_activations(of(None), gpu) and not checkpoints_activations(of(None), cpu)
    assert checkpoints_activations(of(True), cpu) and not checkpoints_activations(of(False), gpu)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_message_names_the_pair_and_what_helps(world, tmp_path, in_one_process, monkeypatch, where):
    run_out(monkeypatch, {"p3-1"}, where)
    values = options(world, tmp_path / "out", max_steps=8, save_steps=1, per_device_train_batch_size=2)
    values["gradient_accumulation_steps"] = 1
    with pytest.raises(TrainingStopped) as raised:
        in_one_process(values)
    said = str(raised.value)
    assert "\n" not in said and said.startswith("out of memory in step ")
    longest = said.split("with pair ")[1].split("'")[1]
    assert "tokens: prompt " in said and "of them its video; responses " in said and " and 1 more" in said
    helping = ("max_batch_tokens=", "gradient_checkpointing=true", "zero_stage=3", "video_max_tokens=", "num_frames=2")
    assert all(option in said for option in helping)
    monkeypatch.undo()
    # What it advises against meeting the pair again does that.
    bound = int(said.split("max_length=")[1].split()[0])
    in_one_process({**values, "max_length": bound, "max_bad_share": 1.0, "resume": "auto"})
    listed = (tmp_path / "out" / "skipped_pairs.rank0.jsonl").read_text()
    assert f'"{longest}"' in listed


def final_weights(folder):
    state = load_file(newest_checkpoint(folder) / "state" / "optimizer.safetensors")
    return {name: value for name, value in state.items() if name.endswith((".master", ".exp_avg"))}


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "full"])
@pytest.mark.parametrize(("zero_stage", "bf16"), [(0, False), (1, False), (1, True)])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_without_what_does_not_fit_is_that_of_the_other_pairs(
    world, tmp_path, in_one_process, monkeypatch, zero_stage, bf16, where, use_peft
):
    """The run is bit for bit that in which those pairs have an unreadable video."""
    names = {"p3-1", "p5-0", "p0-0"}
    more = {"max_steps": 4, "save_steps": 0, "zero_stage": zero_stage, "max_bad_share": 1.0, "lora_dropout": 0.2}
    more |= {"use_peft": use_peft, "bf16": bf16}
    from dataclasses import replace

    pairs = [replace(p, video="gone.mp4") if p.id in names else p for p in read_manifest(world / "pairs.jsonl")]
    write_manifest(world / "without.jsonl", pairs)
    in_one_process(options(world, tmp_path / "without", **more, train_file=str(world / "without.jsonl")))
    with monkeypatch.context() as patch:
        run_out(patch, names, where)
        in_one_process(options(world, tmp_path / "skipped", **more, oom_policy="skip"))
    found, expected = final_weights(tmp_path / "skipped"), final_weights(tmp_path / "without")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("skipped", "without")]
    for name in ("loss", "grad_norm", "skipped_pairs"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    assert rows[0][-1]["oom_skipped"] == 3
    lines = (tmp_path / "skipped" / "skipped_pairs.rank0.jsonl").read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    assert {row["id"] for row in noted} == names and all("out of memory (" in row["reason"] for row in noted)


def test_pairs_that_do_not_fit_count_as_pairs_that_could_not_be_used(world, tmp_path, in_one_process, monkeypatch):
    run_out(monkeypatch, {f"p{video}-{half}" for video in range(8) for half in (0, 1)}, "forward")
    values = options(world, tmp_path / "out", oom_policy="skip", zero_stage=1, max_bad_share=0.3)
    with pytest.raises(TrainingStopped, match="could not be used"):
        in_one_process(values)


@pytest.mark.parametrize("more", [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 1, "offload_optimizer": True}])
def test_where_leaving_out_is_not_possible_it_is_refused(world, tmp_path, more):
    with pytest.raises(UserError, match="oom_policy=skip needs zero_stage 0 or 1"):
        TrainConfig(**options(world, tmp_path, oom_policy="skip", **more))


SCRIPT = """
import sys
import pytest
from tests.training.test_out_of_memory import run_out
from synpo_fast.train import main
run_out(pytest.MonkeyPatch(), {names}, {where!r})
sys.exit(main())
"""


def launched(tmp_path, values, names, where, port):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(names=names, where=where))
    command = train_command(values, num_ranks=2, port=port)
    at = next(index for index, word in enumerate(command) if word.endswith("train.py"))
    return run([*command[:at], str(script), *command[at + 1 :]], timeout=280)


@pytest.mark.heavy
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_one_rank_that_runs_out_ends_all(world, tmp_path, port, zero_stage):
    """No rank waits forever, even if one leaves the others in the middle of a collective, as under stage 3."""
    values = options(world, tmp_path / "out", gradient_accumulation_steps=2, zero_stage=zero_stage)
    done = launched(tmp_path, values, {"p3-1"}, "backward", port)
    assert done.returncode == 1 and "with pair 'p3-1'" in done.stderr, done.stderr[-2000:]


@pytest.mark.heavy
def test_two_ranks_leave_out_what_does_not_fit_one(world, tmp_path, port, in_one_process, monkeypatch):
    """Two ranks end with the weights of one process with the same pairs."""
    names = {"p3-1", "p5-0"}
    more = {
        "max_steps": 4,
        "save_steps": 0,
        "zero_stage": 1,
        "max_bad_share": 1.0,
        "oom_policy": "skip",
        "report": False,
    }
    two = options(world, tmp_path / "two", **more, gradient_accumulation_steps=2)
    done = launched(tmp_path, two, names, "backward", port)
    assert done.returncode == 0, done.stderr[-2000:]
    run_out(monkeypatch, names, "backward")
    in_one_process(options(world, tmp_path / "one", **more, gradient_accumulation_steps=4))
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "one")]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], abs=2e-5)
    assert rows[0][-1]["oom_skipped"] == rows[1][-1]["oom_skipped"] == 2
