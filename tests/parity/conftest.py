"""Fixtures of all parity tests."""

import pytest

from support.convolutions import take_each_way


@pytest.fixture(autouse=True)
def _compute_as_large_networks(monkeypatch):
    """Small networks compute as large ones do, so that the gradients that are compared are those."""
    take_each_way(monkeypatch)
