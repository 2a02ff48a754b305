"""Fixtures of the convolutions' tests: counted calls, dropout that ignores layouts, an empty cache, a new compiler."""

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from unet_denoiser.models.layers import conv, recompute

MAX_TIME_RATIO, MIN_RECOMPUTE_NUMEL = conv._MAX_TIME_RATIO, recompute._MIN_RECOMPUTE_NUMEL


@pytest.fixture(autouse=True)
def narrow_winograd(monkeypatch):
    """The filtering also where it is slower, with 64 channels, which tests can afford; small layers compute again."""
    monkeypatch.setattr(conv, "_MAX_TIME_RATIO", 2.5)
    monkeypatch.setattr(recompute, "_MIN_RECOMPUTE_NUMEL", 0)


@pytest.fixture
def as_measured(monkeypatch, narrow_winograd):
    """The rules as they are for users."""
    monkeypatch.setattr(conv, "_MAX_TIME_RATIO", MAX_TIME_RATIO)
    monkeypatch.setattr(recompute, "_MIN_RECOMPUTE_NUMEL", MIN_RECOMPUTE_NUMEL)


@pytest.fixture
def _same_masks(monkeypatch):
    """Dropout that leaves out the same values whatever the layout in memory."""
    monkeypatch.setattr(
        "unet_denoiser.models.layers.resblock.draw_dropout_mask", lambda like, p: torch.rand(like.shape) >= p
    )


@pytest.fixture
def calls(monkeypatch):
    """How often each function of Winograd's filtering was called."""
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
    monkeypatch.setattr(conv, "_weight_cache", WeakTensorKeyDictionary())
    return conv._weight_cache


@pytest.fixture
def _fresh_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
