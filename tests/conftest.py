"""Where there is no GPU, Triton's interpreter runs the kernels; that must be chosen before triton is first imported."""

import os

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
