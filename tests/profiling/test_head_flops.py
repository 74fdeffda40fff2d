"""Counted FLOPs of the head in runs of the trainer: 4NDV frozen, 6NDV trained, 8NDV without room to keep, 2NDV evaluated."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from synpo_fast.models.policy import Policy
from synpo_fast.ops import native_library
from synpo_fast.training import loop
from synpo_fast.training.evaluation_loop import Evaluator
from tests.world import options


class HeadFlops(TorchDispatchMode):
    """Sums the FLOPs of matrix products one of whose sizes is the vocabulary, inside and outside our C++ operators."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.flops = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            if self.vocabulary in (*a.shape, *b.shape):
                self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        name = str(func)
        if name.startswith("synpo_fast_native.linear_logprobs_forward"):
            hidden, weight, direction = args[0], args[1], args[8]
            self.flops += (4 if direction.shape[0] else 2) * hidden.shape[0] * weight.numel()
        elif name.startswith("synpo_fast_native.linear_logprobs_weight_grad"):
            self.flops += 4 * args[0].shape[0] * args[1].numel()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def counted(monkeypatch, in_one_process):
    """Trains and returns the head's FLOPs per NDV, in the training steps and in the evaluations."""

    def run(values):
        found = {"training": [0, 0], "evaluation": [0, 0]}  # FLOPs, and 1 FLOP per token and weight of the head
        outputs = Policy._outputs

        def noting_tokens(policy, hidden, head, inputs, lengths, keep_bytes, **more):
            phase = "training" if torch.is_grad_enabled() else "evaluation"
            assert sum(lengths) == inputs.labels.numel()
            found[phase][1] += sum(lengths) * head.weight.numel()
            return outputs(policy, hidden, head, inputs, lengths, keep_bytes, **more)

        def counting(phase, call, engine_of):
            def wrapped(*args, **kwargs):
                # The vocabulary of the tiny model, which no other size equals.
                mode = HeadFlops(engine_of(*args).module.policy.head().weight.shape[0])
                with mode:
                    result = call(*args, **kwargs)
                found[phase][0] += mode.flops
                return result

            return wrapped

        monkeypatch.setattr(Policy, "_outputs", noting_tokens)
        monkeypatch.setattr(loop, "train_step", counting("training", loop.train_step, lambda run, batch: run.engine))
        evaluate = counting("evaluation", Evaluator.evaluate, lambda evaluator, engine, *_: engine)
        monkeypatch.setattr(Evaluator, "evaluate", evaluate)
        in_one_process({**values, "max_steps": 2, "report": False, "save_steps": 0, "num_eval_captions": 0})
        return {phase: flops / unit for phase, (flops, unit) in found.items()}

    return run


@pytest.mark.parametrize(
    ("more", "training", "evaluation"),
    [
        ({"use_peft": True}, 4, 2),
        ({"use_peft": False}, 6, 2),
        ({"use_peft": False, "share_prefix": False, "loss_type": "dpo"}, 6 + 2, 2 + 2),  # and the reference's log-probs
        ({"use_peft": False, "loss_type": "sft", "z_loss": 1e-4}, 6, 2),
        ({"use_peft": False, "head_memory_mb": 0}, 8, 2),
    ],
    ids=["frozen head", "trained head", "trained head, dpo", "trained head, sft with z-loss", "nothing kept"],
)
def test_the_head_of_a_run(world, tmp_path, counted, more, training, evaluation):
    if (reason := native_library.reason_unavailable()) is not None:
        pytest.skip(f"no native library: {reason}")
    values = options(world, tmp_path / "out", **more, eval_split=0.3, eval_on_start=False)
    assert counted(values) == {"training": training, "evaluation": evaluation}
