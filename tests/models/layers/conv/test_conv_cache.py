"""The cache of transformed weights: never stale, never larger than it may be."""

import gc
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from support.convolutions import SHALLOW, gradients, make_wide_unet
from support.networks import relative_error
from unet_denoiser.models.layers import conv, weight_cache
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


def exchange(values, i, j):
    values[[i, j]] = values[[j, i]]


def change_numpy_view(layer):
    layer.weight.detach().numpy()[5, 6, 1, 1] += 3


CHANGES = {
    "in place": in_place(lambda weight: weight.mul_(2)),
    "the same values in another order": in_place(lambda weight: weight.copy_(weight.flip(0))),
    "one value in place": in_place(lambda weight: weight[5, 6, 1, 1].add_(3)),
    "through .data": lambda layer: layer.weight.data.mul_(2),
    "an input channel through .data": lambda layer: layer.weight.data[:, 5].zero_(),
    "an output channel through .data": lambda layer: layer.weight.data[5].zero_(),
    "a place of the kernel through .data": lambda layer: layer.weight.data[..., 1, 1].zero_(),
    "two input channels exchanged through .data": lambda layer: exchange(layer.weight.data.transpose(0, 1), 3, 9),
    "two output channels exchanged through .data": lambda layer: exchange(layer.weight.data, 3, 9),
    "two places of the kernel exchanged through .data": lambda layer: exchange(
        layer.weight.data.flatten(2).movedim(2, 0), 0, 8
    ),
    "two signs through .data": lambda layer: layer.weight.data[:, 7, 0, ::2].neg_(),
    "a numpy view": change_numpy_view,
    "a spectral norm's step through .data": lambda layer: layer.weight.data.div_(1.001),
    "other memory": in_place(lambda weight: weight.set_(weight + 1)),
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


@pytest.mark.usefixtures("cache", "default_thresholds")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [320, 512, 768])
def test_a_change_of_any_channel_through_data_is_noticed(width, layout):
    layer, x = Conv2d(width, 32, 3, padding=1).to(memory_format=layout), torch.randn(1, width, 4, 4)
    channels = torch.randperm(width)[:60].tolist()
    with torch.no_grad():
        for channel in channels:
            before = weight_cache.digest_of(layer.weight.detach())
            layer.weight.data[:, channel] *= 1.01
            assert weight_cache.digest_of(layer.weight.detach()) != before, channel
            assert torch.equal(conv._transform_cached(layer.weight, 16), conv.transform_weight(layer.weight))
        assert relative_error(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-5


def test_threads_share_the_cache(cache):
    """Free-threaded Python switches threads anywhere; here, every few instructions."""
    weights, failures, interval = [torch.zeros(4, 4, 3, 3) for _ in range(300)], [], sys.getswitchinterval()

    def run(mine):
        try:
            for weight in mine:
                conv._transform_cached(weight, 16)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=[weights[i::6]]) for i in range(6)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert len(cache) == len(weights)


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
        held = sum(kept.prepared.untyped_storage().nbytes() for kept in cache.values())
        assert held == 4 * sum(weight.untyped_storage().nbytes() for weight in cache)  # no more than the docstring says
    del model
    gc.collect()
    assert len(cache) == 0


def test_cache_size_is_limited(monkeypatch, calls, cache):
    monkeypatch.setattr(weight_cache, "_MAX_BYTES", 2 * 4 * 64 * 64 * 36)  # of two layers
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
