import socket
from pathlib import Path

import pytest
import torch

from tests.training.world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def group():
    """A process group of this process alone, as start_distributed makes it."""
    from synpo_fast.training.config import TrainConfig
    from synpo_fast.training.engine import start_distributed

    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True)
    return start_distributed(config)


@pytest.fixture
def in_one_process(group):
    """Runs a training in this process; returns its RunState."""
    from synpo_fast.training.config import TrainConfig
    from synpo_fast.training.start import train_in_group

    torch.set_num_threads(1)  # as the processes that runs are compared with: sums in another order have other bits
    return lambda values: train_in_group(TrainConfig(**values), group)
