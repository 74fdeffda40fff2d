"""A step never waits for the device between its first forward and its last backward."""

import pytest
import torch

from synpo_fast.models.attention import SEGMENTS
from synpo_fast.training import loop
from synpo_fast.training.engine import Engine
from tests.training.host_reads import counted
from tests.world import options


@pytest.fixture
def watched(monkeypatch, in_one_process):
    """Runs two steps and returns, of the second one, the reads before, between and after its micro-batches."""

    def run(values):
        found = {"before": [], "between": [], "after": []}
        train_step, forward, step = loop.train_step, Engine.forward, Engine.step
        marks = {}

        def mark(name, call):
            def marked(self, *args):
                if marks.get("reads") is not None:
                    marks.setdefault(name, len(marks["reads"].places))
                return call(self, *args)

            return marked

        def one_step(state, batch):
            if state.state.step < 1:
                return train_step(state, batch)
            with counted(monkeypatch) as reads:
                marks["reads"] = reads
                numbers = train_step(state, batch)
            first, last = marks["forward"], marks["step"]
            found.update(before=reads.places[:first], between=reads.places[first:last], after=reads.places[last:])
            return numbers

        monkeypatch.setattr(Engine, "forward", mark("forward", forward))
        monkeypatch.setattr(Engine, "step", mark("step", step))
        monkeypatch.setattr(loop, "train_step", one_step)
        in_one_process({**values, "max_steps": 2, "report": False, "save_steps": 0})
        return found

    return run


@pytest.mark.parametrize(
    "more",
    [
        {"zero_stage": 0, "loss_type": "dpo"},
        {"zero_stage": 1, "loss_type": "dpo", "reference": "precomputed"},
        {"zero_stage": 3, "share_prefix": False},
        {"zero_stage": 2, "use_peft": False, "loss_type": "sft", "z_loss": 1e-4, "label_smoothing_factor": 0.1},
        {"bf16": True, "auxiliary_nll": 0.1, "auxiliary_target": "ground_truth"},
    ],
    ids=lambda more: "-".join(f"{name}={value}" for name, value in more.items()),
)
def test_nothing_is_read_between_micro_batches(world, tmp_path, watched, more):
    values = options(world, tmp_path / "out", vision_attn_implementation=SEGMENTS, **more)
    found = watched(values)
    assert found["before"] == found["between"] == []
    # At its end: the norm of the gradient, and all numbers in one tensor. The rest is DeepSpeed's own.
    norm = "before" if more.get("zero_stage") == 0 else "step"  # stage 0 clips in a hook of that name
    ours = [place for place in found["after"] if place.startswith("synpo_fast ")]
    assert ours == [f"synpo_fast engine.py {norm}", "synpo_fast metrics.py summed_over_ranks"]


def test_diagnostics_read_once(world, tmp_path, watched):
    values = options(world, tmp_path / "out", vision_attn_implementation=SEGMENTS, diagnostics=1)
    found = watched(values)
    assert found["before"] == ["synpo_fast reward_gradients.py reward_gradient_norms"] and found["between"] == []


def test_waits_are_seen(monkeypatch):
    """Each kind of wait is counted, and nothing else is."""
    values = torch.arange(4.0)
    with counted(monkeypatch) as reads:
        torch.tensor(3)
        values.sum() + torch.full((), 2.0, device="cpu")
        values.to("cpu", torch.float64)
    assert reads.places == []
    waits = [
        lambda: values[0].item(),
        lambda: bool(values[0] > 0),
        lambda: float(values[0]),
        lambda: [0] * int(values[1]),
        lambda: values.tolist(),
        lambda: values.cpu(),
        lambda: values[values > 1],
        lambda: torch.tensor(1.0, device="cpu"),
        lambda: torch._foreach_norm([values])[0].item(),
    ]
    for count, wait in enumerate(waits, 1):
        with counted(monkeypatch) as more:
            wait()
        assert len(more.places) == 1, count
