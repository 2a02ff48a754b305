"""Options and settings that all tests share."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network; read when huggingface_hub is imported

import pytest
import torch

torch.set_num_threads(1)
# torch traces its compiler in detail to this logger, which pytest would format and keep: minutes, and gigabytes
logging.getLogger("torch.__trace").propagate = False


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="takes minutes; run with --run-slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def _seed():
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
