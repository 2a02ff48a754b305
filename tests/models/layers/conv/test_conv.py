"""Single convolutions against torch's own, and the rule of when Winograd's filtering pays."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from support.convolutions import AfterSiLU, assert_same, gradients
from support.networks import relative_error
from unet_denoiser.models.layers import weight_cache
from unet_denoiser.models.layers.conv import Conv2d
from unet_denoiser.models.layers.rules import winograd_pays

checked = settings(
    deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None
)

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
}


def pair(*args, **kwargs):
    """Ours and torch's convolution with the same weights."""
    ours, theirs = Conv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@checked
@given(
    channels=st.tuples(*[st.sampled_from([1, 3, 64, 80])] * 2),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 1, 2]),
    bias=st.booleans(),
    batch=st.integers(1, 3),
    size=st.tuples(*[st.integers(1, 40)] * 2),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_conv2d_equals_torch(channels, kernel, stride, bias, batch, size, layout):
    ours, theirs = pair(*channels, kernel, stride, kernel // 2, bias=bias)
    x = LAYOUTS[layout](torch.randn(batch, channels[0], *size)).requires_grad_()
    expected = gradients(theirs, x)
    assert_same(gradients(ours, x), expected, 2e-5)
    with torch.no_grad():
        assert_same({"output": ours(x)}, {"output": expected["output"]}, 2e-5)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("batch", "size"), [(1, (32, 33)), (3, (19, 31)), (1, (300, 7))])
def test_winograd_convolutions_equal_torch(calls, layout, bias, batch, size):
    ours, theirs = pair(64, 72, 3, padding=1, bias=bias)
    x = LAYOUTS[layout](torch.randn(batch, 64, *size)).requires_grad_()
    assert_same(gradients(ours, x), gradients(theirs, x), 2e-5)
    assert calls == {"convolve": 2, "transform_weight": 2, "weight_gradient": 1}


OPTIONS = [
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (8, 8)])
def test_other_options_of_convolutions_equal_torch(options, size):
    """Seamless tiles are made by setting padding_mode="circular", for one."""
    ours, theirs = pair(64, 64, **options)
    x = torch.randn(1, 64, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(AfterSiLU(theirs), x)
    assert_same(gradients(AfterSiLU(ours), x), expected)
    assert_same(gradients(AfterSiLU(ours, again=True), x), expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_an_image_without_batch_equals_torch(kernel):
    ours, theirs = pair(64, 64, kernel, padding=kernel // 2)
    x = torch.randn(64, 32, 32)
    assert relative_error(ours(x), theirs(x)) < 1e-5


# 128 channels in and out, 3x3, padded by one unless said otherwise; for the size of an image, batch 1
RULE = [
    ("1024 pixels", {}, (32, 32), True, True),
    ("fewer", {}, (33, 31), True, False),
    ("several images", {}, (4, 16, 16), True, True),
    ("several images, too few pixels", {}, (3, 16, 16), True, False),
    ("few pixels, but weights that stay", {}, (16, 32), False, True),
    ("fewer, but weights that stay", {}, (16, 28), False, False),
    ("wide", {}, (3, 1000), True, False),  # tiles of four rows
    ("as wide, full tiles", {}, (4, 1000), True, True),
    ("few channels in", {"in_channels": 48}, (64, 64), True, False),
    ("few channels out", {"out_channels": 48}, (64, 64), True, False),
    ("rather few channels", {"in_channels": 64}, (64, 64), True, True),
    ("last tiles nearly empty", {}, (8, 13, 33), True, False),
    ("last tiles full enough", {}, (8, 15, 33), True, True),
    ("last tiles nearly empty, but of many", {}, (65, 65), True, True),
    ("strided", {"stride": 2}, (32, 32), True, False),
    ("strided along one axis", {"stride": (1, 2)}, (32, 32), True, False),
    ("not padded", {"padding": 0}, (32, 32), True, False),
    ("1x1", {"kernel_size": 1, "padding": 0}, (32, 32), True, False),
    ("5x5", {"kernel_size": 5}, (32, 32), True, False),
    ("1x3", {"kernel_size": (1, 3)}, (32, 32), True, False),
    ("grouped", {"groups": 2}, (32, 32), True, False),
    ("dilated", {"dilation": 2}, (32, 32), True, False),
    ("padded by the other side", {"padding_mode": "circular"}, (32, 32), True, False),
    ("double precision", {"dtype": torch.float64}, (32, 32), True, False),
    ("half precision", {"dtype": torch.bfloat16}, (32, 32), True, False),
    ("no memory", {"device": "meta"}, (32, 32), True, False),
]


@pytest.mark.parametrize(("options", "size", "training", "pays"), [row[1:] for row in RULE], ids=[r[0] for r in RULE])
@pytest.mark.usefixtures("default_thresholds")
def test_winograd_pays(options, size, training, pays):
    options = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1} | options
    layer = Conv2d(**options)
    batch = size[:-2] or (1,)
    x = torch.empty(*batch, options["in_channels"], *size[-2:], dtype=layer.weight.dtype, device=layer.weight.device)
    assert winograd_pays(layer, x, training) is pays


@pytest.mark.usefixtures("cache", "default_thresholds")
def test_few_pixels_pay_only_with_cached_weights(monkeypatch):
    layer, few, many = Conv2d(128, 128, 3, padding=1), torch.empty(1, 128, 16, 32), torch.empty(1, 128, 32, 32)
    for room in (0, 1):
        monkeypatch.setattr(weight_cache, "_MAX_BYTES", 4 * 128 * 128 * 36 - 1 + room)
        assert winograd_pays(layer, few, training=False) is bool(room)
        assert winograd_pays(layer, many, training=False)


@pytest.mark.usefixtures("default_thresholds")
def test_winograd_does_not_pay_in_other_precisions():
    layer, x = Conv2d(128, 128, 3, padding=1), torch.empty(1, 128, 32, 32)
    assert not winograd_pays(layer, x.bfloat16(), True)
    with torch.autocast("cpu"):
        assert not winograd_pays(layer, x, True)
    assert winograd_pays(layer, x, True)
