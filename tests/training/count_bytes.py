"""Counts the bytes that a rank passes to collectives in a step of several micro-batches. A test starts it under `deepspeed`.

count_bytes.py FILE: writes {"stage/type/micro-batches": [bytes, calls]} of rank 0, from forward to step. Stage "adapter" and
"full" are the default stages of such runs.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

COLLECTIVES = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "reduce_scatter_tensor": "input",
    "all_gather_into_tensor": "input_tensor",
    "all_gather": "tensor",
}
counted: Counter[str] = Counter()


def count(name: str) -> None:
    plain = getattr(dist, name)
    position = 0 if COLLECTIVES[name] == "tensor" and name != "all_gather" else 1

    def counting(*args, **kwargs):
        tensor = args[position] if len(args) > position else kwargs[COLLECTIVES[name]]
        counted["bytes"] += tensor.numel() * tensor.element_size()
        counted["calls"] += 1
        return plain(*args, **kwargs)

    setattr(dist, name, counting)


class Model(nn.Module):
    """A model with 8,256 parameters, 4,096 of them trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.trained = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.trained(torch.tanh(self.frozen(x))).square().mean()


CASES = {
    **{str(stage): {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    "adapter": {},
    "full": {"use_peft": False},
}


def step_cost(options: dict, dtype: torch.dtype, micros: int) -> list[int]:
    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.training.engine import Engine
    from synpo_fast.training.optimizer import make_optimizer

    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True, **options)
    torch.manual_seed(0)
    module = Model().to(dtype)
    optimizer = make_optimizer(module, learning_rate=1e-3, betas=(0.9, 0.99), epsilon=1e-8, weight_decay=0.0)
    engine = Engine(module, optimizer, config, dtype=dtype)
    for _ in range(2):  # the second step is a typical one
        counted.clear()
        for _ in range(micros):
            engine.backward(engine.forward(torch.randn(8, 64, dtype=dtype)))
        engine.step(1e-3)
    return [counted["bytes"], counted["calls"]]


if __name__ == "__main__":
    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.training.engine import start_distributed, stop_distributed

    for each in COLLECTIVES:
        count(each)
    (file,) = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    start_distributed(TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True))
    found = {
        f"{name}/{str(dtype).removeprefix('torch.')}/{micros}": step_cost(options, dtype, micros)
        for name, options in CASES.items()
        for dtype in ((torch.float32, torch.bfloat16) if name in ("1", "2") else (torch.float32,))
        for micros in (1, 6)
    }
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    stop_distributed()
