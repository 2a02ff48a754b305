"""Downsampling and upsampling against torch, closed forms and diffusers' modules."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch.testing import assert_close

from support.networks import ODD_AND_EVEN_SIZES, half_size, randomise
from unet_denoiser.models.layers.resampling import (
    AveragePool,
    Downsample,
    NearestUpsample,
    TransposedUpsample,
    average_pool,
    crop,
    upsample_nearest,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
@pytest.mark.parametrize("layer", ["conv", "conv_asymmetric", "avgpool"])
def test_every_downsampling_gives_half_the_size_rounded_up(layer, size):
    down = AveragePool() if layer == "avgpool" else Downsample(3, len(size), asymmetric=layer == "conv_asymmetric")
    assert list(down(torch.randn(2, 3, *size)).shape[2:]) == half_size(size)


@pytest.mark.parametrize("size", [(8, 6), (7, 5), (7, 4)])
def test_downsample_is_a_strided_convolution(size):
    down, x = randomise(Downsample(4)), torch.randn(2, 4, *size)
    assert_close(down(x), F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1))


@pytest.mark.parametrize("size", [(2, 2), (8, 6), (8, 5), (7, 6), (3, 3), (1, 1)])
def test_asymmetric_downsample_pads_right_and_bottom(size):
    down, x = randomise(Downsample(4, asymmetric=True)), torch.randn(2, 4, *size)
    even = F.pad(x, (0, size[1] % 2, 0, size[0] % 2))  # an odd size first becomes even
    assert_close(down(x), F.conv2d(F.pad(even, (0, 1, 0, 1)), down.conv.weight, down.conv.bias, stride=2))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample_equals_diffusers(asymmetric):
    down, x = randomise(Downsample(4, asymmetric=asymmetric)), torch.randn(2, 4, 8, 6)
    peer = Downsample2D(4, use_conv=True, padding=0 if asymmetric else 1, name="op")
    peer.load_state_dict(down.state_dict())
    assert_close(down(x), peer(x))


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
def test_average_pool(size):
    x = torch.randn(2, 3, *size)
    expected = x
    for axis, n in enumerate(size, start=2):  # one axis after the other; the last entry of an odd one counts twice
        i = torch.arange(0, n, 2)
        expected = (expected.index_select(axis, i) + expected.index_select(axis, (i + 1).clamp(max=n - 1))) / 2
    assert_close(average_pool(x), expected)


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
def test_nearest_equals_interpolate_to_the_size_of_the_skip(size):
    x = torch.randn(2, 3, *half_size(size))
    assert torch.equal(upsample_nearest(x, size), F.interpolate(x, size=size, mode="nearest"))
    assert torch.equal(upsample_nearest(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
def test_nearest_upsample_is_repetition_then_convolution(size):
    up, x = randomise(NearestUpsample(3, len(size))), torch.randn(2, 3, *half_size(size))
    repeated = F.interpolate(x, size=size, mode="nearest")
    assert_close(up(x, size=size), CONV[len(size)](repeated, up.conv.weight, up.conv.bias, padding=1))


@pytest.mark.parametrize("size", [None, (8, 6), (7, 5), (8, 5)])
def test_nearest_upsample_equals_diffusers(size):
    up, x = randomise(NearestUpsample(4)), torch.randn(2, 4, 4, 3)
    peer = Upsample2D(4, use_conv=True)
    peer.load_state_dict(up.state_dict())
    assert_close(up(x, size=size), peer(x, output_size=size))


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
def test_transposed_upsample_is_the_adjoint_of_a_strided_convolution(size):
    """<up(x), y> = <x, conv(y)> where conv has the same weights, kernel 4, stride 2, padding 1 (PyTorch's definition).

    On odd sizes y is zero beyond the cut.
    """
    up, x, y = (
        randomise(TransposedUpsample(3, len(size))),
        torch.randn(2, 3, *half_size(size)),
        torch.randn(2, 3, *size),
    )
    torch.nn.init.zeros_(up.conv.bias)
    padded = F.pad(y, [p for n in reversed(size) for p in (0, n % 2)])
    down = CONV[len(size)](padded, up.conv.weight, stride=2, padding=1)
    assert up(x, size=size).shape == y.shape
    assert_close((up(x, size=size) * y).sum(), (x * down).sum(), rtol=1e-4, atol=1e-4)


def test_crop_takes_the_first_entries():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(crop(x, (3, 5)), x[:, :, :3, :5])
    assert torch.equal(crop(x, None), x)
