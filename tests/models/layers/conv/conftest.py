"""Fixtures for tests of the convolutions: thresholds, counted calls, dropout of any layout, an empty cache."""

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from support.convolutions import DEFAULTS, take_each_way
from unet_denoiser.models.layers import conv, rules, weight_cache


@pytest.fixture(autouse=True)
def narrow_winograd(monkeypatch):
    """Use Winograd's filtering also with 64 channels, where it is slower, and recompute small inputs too."""
    take_each_way(monkeypatch)
    monkeypatch.setattr(rules, "_MAX_TIME_RATIO", 2.5)


@pytest.fixture
def default_thresholds(monkeypatch, narrow_winograd):
    """Use the thresholds of the package."""
    for name, value in DEFAULTS.items():
        monkeypatch.setattr(rules, name, value)


@pytest.fixture
def _dropout_of_any_layout(monkeypatch):
    """Dropout that drops the same values for each memory layout."""
    monkeypatch.setattr(
        "unet_denoiser.models.layers.resblock.draw_dropout_mask", lambda like, p: torch.rand(like.shape) >= p
    )


@pytest.fixture
def calls(monkeypatch):
    """Count the calls of each function of Winograd's filtering."""
    counts = dict.fromkeys(("convolve", "transform_weight", "weight_gradient"), 0)
    for name in counts:
        function = getattr(conv, name)

        def counted(*args, name=name, function=function, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(conv, name, counted)
    return counts


@pytest.fixture
def cache(monkeypatch):
    """The cache of transformed weights, empty."""
    monkeypatch.setattr(weight_cache, "_kept", WeakTensorKeyDictionary())
    return weight_cache._kept


@pytest.fixture
def _fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
