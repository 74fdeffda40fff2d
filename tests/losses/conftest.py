"""Fixtures for the losses."""

import sys

import pytest


@pytest.fixture
def blind_host(monkeypatch):
    """Makes the losses behave as on a GPU, where the host must not read values."""
    for name, module in list(sys.modules.items()):
        if name.startswith("synpo_fast.losses.") and hasattr(module, "host_can_read"):
            monkeypatch.setattr(module, "host_can_read", lambda tensor: False)
