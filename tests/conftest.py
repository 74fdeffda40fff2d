"""Fixtures of all tests. Without a GPU, Triton's interpreter runs the kernels; it must be chosen before triton is imported."""

import os
import socket
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

hypothesis.settings.register_profile("synpo_fast", deadline=None, derandomize=True)
hypothesis.settings.load_profile("synpo_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if torch.version.cuda is None and item.get_closest_marker("rehearsal"):
            item.add_marker(
                pytest.mark.skip(reason="torch was not built for CUDA; `make rehearse` sets up one that was")
            )
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def group():
    """The process group that start_distributed makes for a single process."""
    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.training.engine import start_distributed

    config = TrainConfig(model_name_or_path="x", train_file="x", output_dir="x", use_cpu=True)
    return start_distributed(config)


@pytest.fixture
def in_one_process(group):
    """A function that trains in this process and returns the RunState."""
    from synpo_fast.config.train_config import TrainConfig
    from synpo_fast.train import run_in_group

    torch.set_num_threads(1)  # like the processes that runs are compared with: another order of sums changes bits
    return lambda values: run_in_group(TrainConfig(**values), group)
