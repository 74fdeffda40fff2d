"""Fixtures for the losses."""

import sys

import pytest


@pytest.fixture
def blind_host(monkeypatch):
    """Makes the losses behave as on a GPU, where the host must not read values."""
    for module in ("pair", "nll", "dpo"):
        monkeypatch.setattr(sys.modules[f"synpo_fast.losses.{module}"], "host_can_read", lambda tensor: False)
