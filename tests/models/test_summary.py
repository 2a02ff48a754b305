"""The summary of a network against independent counts."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.networks import CONDITIONS, SMALL
from unet_denoiser import UNet, UNetConfig, preset, summarize
from unet_denoiser.models.diagram import draw_diagram


@pytest.mark.parametrize("options", [{}, CONDITIONS, {"upsample": "resblock", "dims": 3}, {"image_size": (8, 5)}])
def test_parameters_of_all_parts_add_up(options):
    config = UNetConfig(**SMALL | options)
    parts = summarize(config)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in UNet.from_config(config).parameters())


def test_flops_of_single_layers():
    parts = {p.name: p for p in summarize(UNetConfig(**SMALL))}
    assert parts["input"].flops == 2 * 3 * 8 * 9 * 8 * 8
    assert parts["output"].flops == 2 * 8 * 3 * 9 * 8 * 8
    assert parts["time and conditions"].flops == 2 * (8 * 32 + 32 * 32)


def test_summary_of_ddpm_cifar10():
    parts = {p.name: p for p in summarize(preset("ddpm-cifar10"))}
    assert list(parts)[2:7] == ["encoder 0", "encoder 1", "encoder 2", "encoder 3", "bottleneck"]
    assert parts["encoder 1"]._replace(parameters=0, flops=0) == ("encoder 1", "16x16", 256, 2, "1 heads x 256", 0, 0)
    assert parts["decoder 0"].attention == ""
    assert sum(p.flops for p in parts.values()) == pytest.approx(12.4e9, rel=0.01)


def test_the_picture_in_the_documents_is_in_step():
    picture = Path(__file__).parents[2] / "docs" / "images" / "unet.svg"
    assert picture.read_text() == draw_diagram(preset("specification"))


@pytest.mark.parametrize("name", ["specification", "sdxl-base", "adm-512-cond"])
def test_diagram_shows_the_built_network(name):
    """Well-formed, with every level's size, width, heads and parameters, and all skips."""
    config = preset(name)
    root = ElementTree.fromstring(draw_diagram(config))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for part in summarize(config)[1:]:
        assert f"{part.name}: {part.size}, {part.width} channels" in texts
        assert f"{part.parameters:,} parameters" in texts
        assert not part.attention or any(part.attention in text for text in texts)
    assert sum(int(text.split()[0]) for text in texts if text.endswith(" skips")) == len(config.skip_levels)
