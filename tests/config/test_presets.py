"""Presets, and the architecture chosen for a data set."""

import runpy
from pathlib import Path

import pytest
import torch

from unet_denoiser import Diffusion, UNet, UNetConfig, list_presets, preset
from unet_denoiser.config.defaults import architecture_for

# of the networks as they were published, counted from their own code
PARAMETERS = {
    "ddpm-cifar10": 35_746_307,
    "ddpm-celeba64": 78_700_803,
    "ddpm-256": 113_673_219,
    "iddpm-cifar10": 52_546_438,
    "iddpm-64": 121_063_942,
    "iddpm-64-cond": 273_049_350,
    "iddpm-lsun-256": 113_676_678,
    "iddpm-up-64-256": 279_792_390,
    "adm-64-cond": 295_904_454,
    "edm-imagenet64-cond": 295_899_267,
    "adm-128-cond": 421_529_606,
    "adm-256": 552_814_086,
    "adm-256-cond": 553_838_086,
    "adm-512-cond": 558_997_638,
    "adm-up-64-256": 311_795_910,
    "adm-up-128-512": 308_835_270,
    "ldm-cin256": 400_920_579,
    "ldm-vq4": 274_056_163,
    "ldm-churches": 294_966_916,
    "ldm-text2img": 872_300_484,
    "ldm-super-resolution": 113_622_563,
    "ldm-inpainting": 387_245_827,
    "sd-1.5": 859_520_964,
    "sd-1.5-inpainting": 859_535_364,
    "instruct-pix2pix": 859_532_484,
    "lcm-sd-1.5": 859_602_884,
    "sd-2": 865_910_724,
    "sd-2-base": 865_910_724,
    "sd-2-inpainting": 865_925_124,
    "sd-2-depth": 865_913_604,
    "sd-x4-upscaler": 473_398_020,
    "sdxl-base": 2_567_463_684,
    "sdxl-inpainting": 2_567_478_084,
    "sdxl-refiner": 2_259_526_660,
}


def count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet.from_config(config).parameters())


def test_specification_is_the_default():
    assert preset("specification") == UNetConfig()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    assert count(preset(name)) == PARAMETERS[name]


def test_every_published_preset_is_counted():
    assert set(list_presets()) == {"specification", *PARAMETERS}
    assert UNet.from_preset("ddpm-cifar10", dropout=0.0).config.dropout == 0.0


@pytest.mark.parametrize("size", [8, 32, 64])
def test_no_level_loses_the_time_embedding(size):
    """At least 4 channels in every group of the normalisation."""
    for options in ({}, {"model_channels": 12}):
        config = architecture_for(1, (size, size), None, options)
        assert all(width // config.norm_groups >= 3 for width in config.widths)


def test_unknown_names_the_known():
    with pytest.raises(ValueError, match=r"preset='sd-9' is not one of .*ddpm-cifar10"):
        preset("sd-9")


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


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 256])
def test_on_a_cpu_the_network_is_small(size):
    usual, small = (architecture_for(3, (size, size), None, {}, on_cpu=on_cpu) for on_cpu in (False, True))
    assert small.resolutions == usual.resolutions
    assert (count(small) < 0.5 * count(usual)) == (size > 8)
    assert architecture_for(3, (size, size), None, {"model_channels": 48}, on_cpu=True).model_channels == 48
    assert architecture_for(3, (size, size), None, {}, base=preset("ddpm-cifar10"), on_cpu=True).model_channels == 128


def test_starts_from_a_preset():
    config = architecture_for(3, (32, 32), 5, {"dropout": 0.0}, base=preset("ddpm-cifar10"))
    assert (config.widths, config.downsample) == ((128, 256, 256, 256), "conv_asymmetric")
    assert (config.num_classes, config.dropout) == (5, 0.0)
    assert architecture_for(3, (64, 64), None, {}, base=preset("specification")).context_dim is None


def test_the_family_page_is_in_step():
    """docs/family.md is what docs/family.py writes, and names every published network once."""
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "family.py"))["page"]()
    assert (docs / "family.md").read_text() == page
    assert all(page.count(f"| {name} |") == 1 for name in PARAMETERS)
    assert all(f"{count:,}" in page for count in PARAMETERS.values())


@pytest.mark.parametrize("base", [None, "adm-256", "ddpm-cifar10"])
def test_channels_of_the_process(base):
    process = Diffusion(variance_type="learned_range", self_conditioning=True)
    config = architecture_for(1, (16, 16), None, {}, base=base and preset(base), network_channels=process.channels(1))
    assert (config.in_channels, config.out_channels) == (2, 2)
