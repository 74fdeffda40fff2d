"""One optimiser step: what ranks agree on, and that training and the profile take the same one."""

import torch

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.data.encoded import EncodedPair
from synpo_fast.data.loader import StepBatch
from synpo_fast.models.policy import Sample
from synpo_fast.train import run_in_group
from synpo_fast.training import step as training_step
from synpo_fast.training.engine import Engine
from synpo_fast.training.step import Stepper
from tests.world import options

CPU = torch.device("cpu")


def test_ranks_with_fewer_micro_batches_are_filled_up_with_weight_0(monkeypatch):
    """Another rank has 4 pairs and as many micro-batches. The placeholder is this rank's shortest pair."""
    pairs = [EncodedPair(Sample(tuple(range(length)), ((1, 2), (3,))), str(length)) for length in (6, 5)]
    monkeypatch.setattr(
        training_step, "agree_on_forwards", lambda micros, pairs, placeholder, device: (4, pairs + 4, placeholder)
    )
    config = TrainConfig(
        model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True, per_device_train_batch_size=1
    )
    micros, pairs_in_step = Stepper(config, None, CPU).agree_on_micro_batches(StepBatch(0, 0, pairs, 2, [], 0.0))
    assert [([pair.id for pair in micro], weight) for micro, weight in micros] == [
        (["6"], 1.0),
        (["5"], 1.0),
        (["5"], 0.0),
        (["5"], 0.0),
    ]
    assert pairs_in_step == 6


def test_training_and_the_profile_take_the_same_step(world, tmp_path, group, monkeypatch):
    """One function is replaced, and both take the other step. In it every call of the engine is made."""
    seen, inside = [], []
    take, agree = Stepper.take, Stepper.agree_on_micro_batches

    def spied(stepper, batch, **more):
        seen.append("taken")
        inside.append(True)
        try:
            return take(stepper, batch, **more)
        finally:
            inside.pop()

    def agreed(stepper, batch):
        seen.append("agreed")
        return agree(stepper, batch)

    def called(name):
        own = getattr(Engine, name)

        def call(engine, *inputs):
            assert inside, f"Engine.{name} was called by something that is no step of training"
            seen.append(name)
            return own(engine, *inputs)

        return call

    monkeypatch.setattr(Stepper, "take", spied)
    monkeypatch.setattr(Stepper, "agree_on_micro_batches", agreed)
    for name in ("forward", "backward", "step"):
        monkeypatch.setattr(Engine, name, called(name))
    a_step = ["taken", "agreed", *["forward", "backward"] * 2, "step"]
    values = {**options(world, tmp_path / "run", gradient_accumulation_steps=2), "max_steps": 2}
    run_in_group(TrainConfig(**values), CPU)
    assert seen == 2 * a_step
    seen.clear()
    values = options(world, tmp_path / "profile", gradient_accumulation_steps=2, profile=1)
    run_in_group(TrainConfig(**values), CPU)
    assert seen == len(seen) // len(a_step) * a_step and len(seen) >= 24 * len(a_step)
