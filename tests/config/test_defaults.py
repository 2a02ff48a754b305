"""The architecture chosen for a dataset."""

import pytest

from support.networks import count_parameters
from unet_denoiser import Diffusion, preset
from unet_denoiser.config.defaults import architecture_for, default_steps


@pytest.mark.parametrize("size", [8, 32, 64])
def test_default_norm_groups_have_several_channels(size):
    """At least 4 channels in every group of the normalisation."""
    for options in ({}, {"model_channels": 12}):
        config = architecture_for(1, (size, size), None, options)
        assert all(width // config.norm_groups >= 3 for width in config.widths)


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (28, 28), (32, 32), (64, 64), (37, 50), (128, 256), (16,), (8, 8, 8)])
def test_every_size_gets_a_network_with_attention(size):
    config = architecture_for(2, size, None, {})
    assert (config.in_channels, config.out_channels, config.dims) == (2, 2, len(size))
    assert config.resolutions[0] == max(size)
    assert any(map(config.has_attention, range(len(config.widths))))
    assert config.context_dim is None
    count_parameters(config)


@pytest.mark.parametrize(
    "options", [{"model_channels": 20}, {"channel_mult": (1, 2, 3)}, {"num_heads": 4, "head_dim": None}]
)
def test_given_options_replace_defaults(options):
    config = architecture_for(1, (16, 16), 10, options)
    assert all(getattr(config, name) == value for name, value in options.items())
    assert config.num_classes == 10


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 256])
def test_smaller_network_on_a_cpu(size):
    usual, small = (architecture_for(3, (size, size), None, {}, on_cpu=on_cpu) for on_cpu in (False, True))
    assert small.resolutions == usual.resolutions
    assert (count_parameters(small) < 0.5 * count_parameters(usual)) == (size > 8)
    assert architecture_for(3, (size, size), None, {"model_channels": 48}, on_cpu=True).model_channels == 48
    assert architecture_for(3, (size, size), None, {}, base=preset("ddpm-cifar10"), on_cpu=True).model_channels == 128


def test_architecture_from_a_preset():
    config = architecture_for(3, (32, 32), 5, {"dropout": 0.0}, base=preset("ddpm-cifar10"))
    assert (config.widths, config.downsample) == ((128, 256, 256, 256), "conv_asymmetric")
    assert (config.num_classes, config.dropout) == (5, 0.0)
    assert architecture_for(3, (64, 64), None, {}, base=preset("specification")).context_dim is None


@pytest.mark.parametrize("base", [None, "adm-256", "ddpm-cifar10"])
def test_channels_with_learned_variance_and_self_conditioning(base):
    process = Diffusion(variance_type="learned_range", self_conditioning=True)
    config = architecture_for(1, (16, 16), None, {}, base=base and preset(base), network_channels=process.channels(1))
    assert (config.in_channels, config.out_channels) == (2, 2)


@pytest.mark.parametrize(
    ("images", "seconds", "steps"),
    [
        (100_000, None, 20_000),
        (None, None, 20_000),
        (None, 1.03, 3200),  # 55 minutes
        (100_000, 0.01, 20_000),
        (100_000, 60.0, 55),
        (100_000, 10_000.0, 1),
        (100, None, 2000),
        (640, None, 10_000),  # 500 passes
        (100, 3.3, 1000),
    ],
)
def test_a_training_is_as_long_as_device_and_data_allow(images, seconds, steps):
    assert default_steps(images, 32, seconds) == steps
