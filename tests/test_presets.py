"""Presets, and the architecture chosen for a data set."""

import pytest
import torch

from unet_denoiser import UNet, UNetConfig, list_presets, preset
from unet_denoiser.presets import architecture_for


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet.from_config(config).parameters())


def test_specification_is_the_default():
    assert preset("specification") == UNetConfig()


def test_ddpm_cifar10_has_the_published_parameters():
    assert count(preset("ddpm-cifar10")) == 35_746_307


@pytest.mark.parametrize("size", [8, 32, 64])
def test_no_level_loses_the_time_embedding(size):
    """At least 4 channels in every group of the normalisation."""
    for options in ({}, {"model_channels": 12}):
        config = architecture_for(1, (size, size), None, options)
        assert all(width // config.norm_groups >= 3 for width in config.widths)


def test_unknown_names_the_known():
    with pytest.raises(ValueError, match=r"preset='sd-9' is not one of .*ddpm-cifar10"):
        preset("sd-9")
    assert set(list_presets()) >= {"specification", "ddpm-cifar10"}


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (28, 28), (32, 32), (64, 64), (37, 50), (128, 256), (16,), (8, 8, 8)])
def test_every_size_gets_a_network_with_attention(size):
    config = architecture_for(2, size, None, {})
    assert (config.in_channels, config.out_channels, config.dims) == (2, 2, len(size))
    assert config.resolutions[0] == max(size)
    assert any(map(config.has_attention, range(len(config.widths))))
    assert config.context_dim is None
    count(config)


@pytest.mark.parametrize(
    "options", [{"model_channels": 20}, {"channel_mult": (1, 2, 3)}, {"num_heads": 4, "head_dim": None}]
)
def test_options_win_and_the_rest_adapts(options):
    config = architecture_for(1, (16, 16), 10, options)
    assert all(getattr(config, name) == value for name, value in options.items())
    assert config.num_classes == 10


def test_starts_from_a_preset():
    config = architecture_for(3, (32, 32), 5, {"dropout": 0.0}, "ddpm-cifar10")
    assert (config.widths, config.downsample) == ((128, 256, 256, 256), "conv_asymmetric")
    assert (config.num_classes, config.dropout) == (5, 0.0)
    assert architecture_for(3, (64, 64), None, {}, "specification").context_dim is None
