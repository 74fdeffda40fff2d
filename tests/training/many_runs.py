"""Runs several trainings in one process group, which saves start-up time. Tests start it, alone or under `deepspeed`.

many_runs.py FILE: a JSON list of option mappings, run one after another.
"""

import faulthandler
import json
import sys
from pathlib import Path

import torch.distributed as dist

from synpo_fast.config.train_config import TrainConfig
from synpo_fast.train import run_in_group
from synpo_fast.training.engine import start_distributed, stop_distributed

if __name__ == "__main__":
    faulthandler.enable()  # shows where, if a process dies of a signal
    (file,) = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    for values in json.loads(Path(file).read_text()):
        config = TrainConfig(**values)
        run_in_group(config, start_distributed(config))
    dist.barrier()  # once a rank died of SIGABRT here, after its runs: nothing is known of the cause, so all leave together
    stop_distributed()
