"""GroupNorm against torch's, and the number of its groups."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from support.networks import randomise
from unet_denoiser.models.layers.norm import group_norm

# Written out, not computed: checkpoints depend on it. 32 groups at most for 1 to 40 channels and common widths.
GROUPS = dict(enumerate([*range(1, 33), 11, 17, 7, 18, 1, 19, 13, 20], start=1)) | {
    48: 24,
    64: 32,
    72: 24,
    96: 32,
    97: 1,
    100: 25,
    192: 32,
    224: 32,
    320: 32,
    1000: 25,
}


def test_number_of_groups():
    assert {channels: group_norm(channels).num_groups for channels in GROUPS} == GROUPS


@pytest.mark.parametrize(("channels", "groups", "expected"), [(12, 8, 6), (16, 8, 8), (9, 4, 3), (7, 4, 1), (6, 1, 1)])
def test_number_of_groups_with_other_limits(channels, groups, expected):
    norm = group_norm(channels, groups, eps=1e-3)
    x = torch.randn(2, channels, 5)
    assert_close(norm(x), F.group_norm(x, expected, eps=1e-3))


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize(("size", "layout"), [((8, 8), torch.channels_last), ((4, 4, 4), torch.channels_last_3d)])
def test_gradients_of_weight_and_bias_alone(size, layout, trained):
    """As after frozen layers; torch's own crashes where the channels are last."""
    norm = randomise(group_norm(8, 4)).requires_grad_(False)
    getattr(norm, trained).requires_grad_(True)
    x = torch.randn(2, 8, *size)
    outs = [norm(x), norm(x.contiguous(memory_format=layout))]
    assert outs[1].is_contiguous(memory_format=layout)
    expected, found = (torch.autograd.grad((out * x).sum(), getattr(norm, trained))[0] for out in outs)
    assert_close(found, expected)
