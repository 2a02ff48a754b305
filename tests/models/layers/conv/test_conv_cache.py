"""The cache of transformed weights: never stale, never larger than it may be."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.convolutions import SHALLOW, gradients, make_wide_unet
from support.networks import relative_error
from unet_denoiser.models.layers import conv
from unet_denoiser.models.layers.conv import Conv2d


def step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(1, 64, 32, 32)).square().sum().backward()
    optimizer.step()


def in_place(change):
    def apply(layer):
        with torch.no_grad():
            change(layer.weight)

    return apply


def new_parameter(layer):
    layer.weight = nn.Parameter(2 * layer.weight.detach())


CHANGES = {
    "in place": in_place(lambda weight: weight.mul_(2)),
    "the same values in another order": in_place(lambda weight: weight.copy_(weight.flip(0))),
    "one value in place": in_place(lambda weight: weight[5, 6, 1, 1].add_(3)),
    "through .data": lambda layer: layer.weight.data.mul_(2),
    "an input channel through .data": lambda layer: layer.weight.data[:, 5].zero_(),
    "an output channel through .data": lambda layer: layer.weight.data[5].zero_(),
    "a place of the kernel through .data": lambda layer: layer.weight.data[..., 1, 1].zero_(),
    "other .data": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "an optimizer's step": step,
    "load_state_dict": lambda layer: layer.load_state_dict(Conv2d(64, 64, 3, padding=1).state_dict()),
    "load_state_dict, assigned": lambda layer: layer.load_state_dict(
        Conv2d(64, 64, 3, padding=1).state_dict(), assign=True
    ),
    "another parameter": new_parameter,
}


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_weights_are_transformed_again(calls, change, mode):
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-9, 10, layer.weight.shape) / 64)  # sums of these are free of rounding
    with mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
        assert calls == {"convolve": 2, "transform_weight": 1, "weight_gradient": 0}
    CHANGES[change](layer)
    with mode():
        after = layer(x)
        assert relative_error(after, F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
    assert relative_error(after, before) > 1e-4


def test_inference_tensors_are_not_cached(calls, cache):
    """Their changes cannot be noticed."""
    with torch.inference_mode():
        layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 32, 32)
        for _ in range(2):
            assert relative_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
            layer.weight[5, 6, 1, 1] += 3
    assert calls["transform_weight"] == 2
    assert len(cache) == 0


def test_weights_of_large_images_are_not_cached(calls, cache):
    """Transforming them again takes little beside the convolution."""
    layer, x = Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 80, 80)
    with torch.no_grad():
        layer(x)
    assert calls["transform_weight"] == 1
    assert len(cache) == 0


def test_training_caches_no_weights(calls, cache):
    model, args = make_wide_unet(**SHALLOW)
    gradients(model.train(), **args)
    model.enable_gradient_checkpointing()
    gradients(model, **args)
    layer = Conv2d(64, 64, 3, padding=1)
    gradients(layer, torch.randn(1, 64, 32, 32))
    assert calls["transform_weight"] > 0
    assert len(cache) == 0


def test_cache_is_freed_with_the_network(cache):
    model, args = make_wide_unet(**SHALLOW)
    with torch.no_grad():
        model(**args)
        assert len(cache) > 0
        held = sum(kept.weight.untyped_storage().nbytes() for kept in cache.values())
        assert held == 4 * sum(weight.untyped_storage().nbytes() for weight in cache)  # no more than the docstring says
    del model
    gc.collect()
    assert len(cache) == 0


def test_cache_size_is_limited(monkeypatch, calls, cache):
    monkeypatch.setattr(conv, "_MAX_CACHED_BYTES", 2 * 4 * 64 * 64 * 36)  # of two layers
    layers, x = [Conv2d(64, 64, 3, padding=1) for _ in range(3)], torch.randn(1, 64, 32, 32)
    with torch.no_grad():
        for layer in layers * 2:
            assert relative_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5
        assert set(cache) == {layer.weight for layer in layers[:2]}
        assert calls["transform_weight"] == 2 + 2
        del layers[0], layer
        gc.collect()
        layers[1](x)
    assert set(cache) == {layer.weight for layer in layers}
