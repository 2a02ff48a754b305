"""Winograd's filtering against torch's convolution and autograd, in double precision, for any size and layout."""

import math
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from support.networks import relative_error
from unet_denoiser.models.layers import rules, winograd
from unet_denoiser.models.layers.conv import conv3x3, conv3x3_backward
from unet_denoiser.models.layers.winograd import convolve, transform_weight, weight_gradient

checked = settings(
    deadline=None, derandomize=True, max_examples=80, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    """Fill uninitialized memory with NaN."""
    torch.use_deterministic_algorithms(True)  # which also fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


# the same values (N, H, W, C) in other places of memory
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels first": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "columns first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda x: torch.stack([x, x.new_full(x.shape, torch.nan)], -1).flatten(3)[..., ::2],
    "part of a larger image": lambda x: F.pad(x, (1, 2, 2, 1, 3, 1, 1, 1), value=torch.nan)[
        1:-1, 3:-1, 2:-1, 1 : x.shape[3] + 1
    ],
}


@pytest.fixture(autouse=True)
def _winograd_always(monkeypatch):
    """The operator uses Winograd's filtering at these small sizes too."""
    monkeypatch.setattr(rules, "_MAX_TIME_RATIO", math.inf)


@st.composite
def cases(draw):
    """Input, weights, bias, and the gradient of the output, in double precision; the number of tiles in a block."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    images, in_ch, out_ch = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    height, width = draw(st.one_of(st.tuples(*[st.integers(1, 17)] * 2), st.tuples(*[st.integers(1, 70)] * 2)))
    x = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](normal(images, height, width, in_ch))
    grad = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](normal(images, height, width, out_ch))
    weight, bias = normal(out_ch, in_ch, 3, 3), normal(out_ch) if draw(st.booleans()) else None
    tiles = draw(st.sampled_from([winograd._MAX_BLOCK_TILES, 1, 2, 5, 12, 40]))
    return x, weight, bias, grad, tiles


def reference(x, weight, bias, grad):
    """Output and gradients of the input and the weights, by torch."""
    x, weight = x.permute(0, 3, 1, 2).clone().requires_grad_(), weight.clone().requires_grad_()
    out = F.conv2d(x, weight, bias, padding=1)
    dx, dw = torch.autograd.grad(out, (x, weight), grad.permute(0, 3, 1, 2))
    return out.detach().permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1), dw


def ours(x, weight, bias, grad):
    out = convolve(x, transform_weight(weight), bias)
    return out, convolve(grad, transform_weight(weight, rotated=True)), weight_gradient(x, grad)


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@checked
@given(cases())
def test_output_and_gradients_equal_torch(case):
    *args, tiles = case
    expected, before = reference(*args), [None if t is None else t.clone() for t in args]
    with patch.object(winograd, "_MAX_BLOCK_TILES", tiles):
        actual = ours(*args)
    assert_close(actual, expected, 1e-11)
    assert actual[0].is_contiguous()
    assert all(t is None or torch.equal(t, b) for t, b in zip(args, before, strict=True))  # nothing is overwritten


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((1, 8, 8), {(1, 2)}),  # images in a block, rows of tiles
        ((40, 9, 16), {(10, 3)}),  # several images in a block
        ((23, 16, 16), {(8, 4), (7, 4)}),  # the last block has fewer
        ((2, 70, 70), {(1, 7), (1, 4)}),  # several bands of an image, the last one lower
        ((1, 9, 530), {(1, 1)}),  # a row of tiles that is longer than a block should be
        ((3, 530, 3), {(1, 128), (1, 5)}),
    ],
)
def test_every_way_to_cut_images_into_blocks(shape, blocks):
    rows, columns = -(-shape[1] // 4), -(-shape[2] // 4)
    assert {(b.images, b.rows) for b in winograd._blocks(shape[0], rows, columns)} == blocks
    normal = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    args = normal(*shape, 3), normal(4, 3, 3, 3), normal(4), normal(*shape, 4)
    assert_close(ours(*args), reference(*args), 1e-11)


@checked
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 5, 12, 128]))
def test_blocks_hold_each_tile_once_within_the_limit(images, rows, columns, tiles):
    seen = torch.zeros(images, rows)
    with patch.object(winograd, "_MAX_BLOCK_TILES", tiles):
        for block in winograd._blocks(images, rows, columns):
            assert block.tiles <= max(tiles, columns)
            assert block.images == 1 or block.rows == rows
            seen[block.image : block.image + block.images, block.row : block.row + block.rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("in_ch", "out_ch", "size"), [(128, 128, (32, 33)), (320, 128, (19, 20)), (256, 512, (16, 16)), (512, 512, (8, 8))]
)
@pytest.mark.parametrize("images", [1, 3])
def test_rounding_in_single_precision_at_real_widths(images, in_ch, out_ch, size):
    """Five times that of torch's convolution; a single value, by luck, a few times as much again."""
    x, grad = F.silu(torch.randn(images, *size, in_ch)), torch.randn(images, *size, out_ch)
    weight, bias = torch.randn(out_ch, in_ch, 3, 3) / (3 * in_ch**0.5), torch.zeros(out_ch)
    expected = reference(*(t.double() for t in (x, weight, bias, grad)))
    for a, e in zip(ours(x, weight, bias, grad), expected, strict=True):
        assert (a - e).norm() <= 4e-6 * e.norm()
        assert relative_error(a, e) <= 2e-5


# ---- as an operator of torch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("images", "size"), [(1, (5, 3)), (2, (4, 6))])
def test_gradcheck_of_the_operator(images, size, bias):
    shapes = [(images, 2, *size), (3, 2, 3, 3), (3,)]
    x, weight, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert gradcheck(lambda *args: conv3x3(*args, False), (x, weight, b if bias else None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck_of_the_operators(layout, dtype):
    """Schema, registration of autograd, shapes and strides as announced to compilers."""
    shapes = [(2, 5, 9, 7), (4, 5, 3, 3)]
    x, weight = (torch.randn(s, dtype=dtype).to(memory_format=layout).requires_grad_() for s in shapes)
    grad = torch.randn(2, 4, 9, 7, dtype=dtype).to(memory_format=layout)
    bias = torch.randn(4, dtype=dtype, requires_grad=True)
    opcheck(conv3x3, (x, weight, bias, False))
    opcheck(conv3x3, (x.detach(), weight.detach(), None, True))
    opcheck(conv3x3_backward, (grad, x.detach(), weight.detach()))
