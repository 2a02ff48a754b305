"""GroupNorm and dropout masks as the compiler sees them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support.networks import relative_error
from unet_denoiser.models.layers.traced import group_norm_by_sums, hashed_mask


def make_norm(channels, groups, dtype=torch.float32):
    norm = nn.GroupNorm(groups, channels).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.1)
        norm.bias.normal_(0, 0.1)
    return norm


@pytest.mark.parametrize("shape", [(2, 12, 7), (2, 12, 5, 4), (3, 12, 2, 3, 4), (2, 12, 1, 1)])
def test_norm_and_its_gradients_are_those_of_torch(shape):
    norm, x = make_norm(12, 4, torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs, gradient = [x, norm.weight, norm.bias], torch.randn(shape, dtype=torch.float64)
    found = group_norm_by_sums(x, norm)
    expected = F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected)
    pairs = zip(*(torch.autograd.grad(out, inputs, gradient) for out in (found, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_norm_is_as_exact_as_torchs(mean):
    norm, x = make_norm(64, 32), torch.randn(2, 64, 16, 16) + mean
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    error = relative_error(F.group_norm(x, 32, norm.weight, norm.bias, norm.eps).double(), exact)
    assert relative_error(group_norm_by_sums(x, norm).double(), exact) < max(2 * error, 1e-6)


def test_norm_of_half_precision_computes_in_float32():
    norm, x = make_norm(64, 32), (torch.randn(2, 64, 16, 16) + 3).bfloat16()
    found = group_norm_by_sums(x, norm)
    expected = F.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), expected) < 2**-8


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5])
def test_masks_are_random(p):
    torch.manual_seed(0)
    x = torch.empty(8, 32, 33, 31)
    masks = [hashed_mask(x, p) for _ in range(2)]
    for mask in masks:
        dropped = (~mask).double()
        assert dropped.mean().item() == pytest.approx(p, abs=4 * (p / x.numel()) ** 0.5)
        in_memory = dropped.movedim(1, -1).flatten() - p
        for lag in (1, 2, 3, 16, 32, 33 * 32, 2**16):  # of neighbours, channels, rows
            assert abs((in_memory[lag:] * in_memory[:-lag]).mean()) < 5 * p / x.numel() ** 0.5
    both = (~masks[0] & ~masks[1]).double().mean().item()
    assert both == pytest.approx(p * p, abs=5 * p / x.numel() ** 0.5)


def test_masks_depend_on_the_seed_alone_and_have_channels_last():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(hashed_mask(torch.empty(2, 8, 4, 4), 0.5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].is_contiguous(memory_format=torch.channels_last)
