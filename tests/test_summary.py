"""A network's summary against counts made another way."""

import pytest

from helpers import CONDITIONS, SMALL
from unet_denoiser import UNet, UNetConfig, preset, summarize


@pytest.mark.parametrize("options", [{}, CONDITIONS, {"upsample": "resblock", "dims": 3}, {"image_size": (8, 5)}])
def test_parameters_add_up(options):
    config = UNetConfig(**SMALL | options)
    parts = summarize(config)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in UNet.from_config(config).parameters())


def test_flops_of_one_convolution():
    parts = {p.name: p for p in summarize(UNetConfig(**SMALL))}
    assert parts["input"].flops == 2 * 3 * 8 * 9 * 8 * 8
    assert parts["output"].flops == 2 * 8 * 3 * 9 * 8 * 8
    assert parts["time and conditions"].flops == 2 * (8 * 32 + 32 * 32)


def test_rows_of_ddpm_cifar10():
    parts = {p.name: p for p in summarize(preset("ddpm-cifar10"))}
    assert list(parts)[2:7] == ["encoder 0", "encoder 1", "encoder 2", "encoder 3", "bottleneck"]
    assert parts["encoder 1"]._replace(parameters=0, flops=0) == ("encoder 1", "16x16", 256, 2, "1 heads x 256", 0, 0)
    assert parts["decoder 0"].attention == ""
    assert sum(p.flops for p in parts.values()) == pytest.approx(12.4e9, rel=0.01)
