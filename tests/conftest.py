"""Options and settings that all tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; read when huggingface_hub is imported

import pytest
import torch

from unet_denoiser.conv import _WORTH as WORTH

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def narrow_winograd(monkeypatch):
    """The filtering also where it is slower: with 64 channels, which tests can afford."""
    monkeypatch.setattr("unet_denoiser.conv._WORTH", 2.5)


@pytest.fixture
def as_measured(monkeypatch, narrow_winograd):
    """The rule as it is for users, in a file whose other tests use `narrow_winograd`."""
    monkeypatch.setattr("unet_denoiser.conv._WORTH", WORTH)
