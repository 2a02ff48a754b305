"""Published architectures by name."""

import runpy
from pathlib import Path

import pytest

from support.networks import count_parameters
from unet_denoiser import UNet, UNetConfig, list_presets, preset

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


def test_specification_is_the_default():
    assert preset("specification") == UNetConfig()


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_parameters(name):
    assert count_parameters(preset(name)) == PARAMETERS[name]


def test_every_published_preset_is_counted():
    assert set(list_presets()) == {"specification", *PARAMETERS}
    assert UNet.from_preset("ddpm-cifar10", dropout=0.0).config.dropout == 0.0


def test_unknown_preset_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"preset='sd-9' is not one of .*ddpm-cifar10"):
        preset("sd-9")


def test_the_page_of_presets_is_in_step():
    """docs/reference/presets.md is what docs/reference/presets.py writes, and names every published network once."""
    docs = Path(__file__).parents[2] / "docs" / "reference"
    page = runpy.run_path(str(docs / "presets.py"))["page"]()
    assert (docs / "presets.md").read_text() == page
    assert all(page.count(f"| {name} |") == 1 for name in PARAMETERS)
    assert all(f"{count:,}" in page for count in PARAMETERS.values())
