"""Time embedding, resampling and residual block, against torch built-ins, closed forms and diffusers' modules."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.testing import assert_close

from support import specification
from support.networks import randomise, relative_error
from unet_denoiser import ResBlock, SinusoidalPosEmb
from unet_denoiser.models.layers.embeddings import TimeMLP
from unet_denoiser.models.layers.norm import group_norm
from unet_denoiser.models.layers.resampling import (
    AveragePool,
    Downsample,
    NearestUpsample,
    TransposedUpsample,
    average_pool,
    crop,
    upsample_nearest,
)
from unet_denoiser.models.layers.resblock import Block, dropout_mask

# ---- normalisation -------------------------------------------------------------------------------------------------

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


def test_group_rule_is_pinned():
    assert {channels: group_norm(channels).num_groups for channels in GROUPS} == GROUPS


@pytest.mark.parametrize(("channels", "groups", "expected"), [(12, 8, 6), (16, 8, 8), (9, 4, 3), (7, 4, 1), (6, 1, 1)])
def test_group_rule_with_other_limits(channels, groups, expected):
    norm = group_norm(channels, groups, eps=1e-3)
    x = torch.randn(2, channels, 5)
    assert_close(norm(x), F.group_norm(x, expected, eps=1e-3))


# ---- time ----------------------------------------------------------------------------------------------------------

TIMES = torch.tensor([0.0, 1.0, 0.37, 20.5, 999.0, 1000.0])


@pytest.mark.parametrize("trained", ["weight", "bias"])
@pytest.mark.parametrize(("size", "layout"), [((8, 8), torch.channels_last), ((4, 4, 4), torch.channels_last_3d)])
def test_a_norm_whose_input_needs_no_gradient(size, layout, trained):
    """As after frozen layers; torch's own crashes where the channels are last."""
    norm = randomise(group_norm(8, 4)).requires_grad_(False)
    getattr(norm, trained).requires_grad_(True)
    x = torch.randn(2, 8, *size)
    outs = [norm(x), norm(x.contiguous(memory_format=layout))]
    assert outs[1].is_contiguous(memory_format=layout)
    expected, found = (torch.autograd.grad((out * x).sum(), getattr(norm, trained))[0] for out in outs)
    assert_close(found, expected)


@pytest.mark.parametrize("dim", [4, 5, 32, 33, 320])
@pytest.mark.parametrize(("frequencies", "shift"), [("endpoint", 1), ("half", 0)])
def test_sinusoids_equal_diffusers(dim, frequencies, shift):
    expected = get_timestep_embedding(TIMES, dim, downscale_freq_shift=shift)
    assert_close(SinusoidalPosEmb(dim, frequencies)(TIMES), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frequencies", ["endpoint", "half"])
def test_sinusoids_of_two_and_three_channels_have_frequency_one(frequencies):
    expected = torch.stack([TIMES.sin(), TIMES.cos()], dim=1)
    assert_close(SinusoidalPosEmb(2, frequencies)(TIMES), expected)
    assert_close(SinusoidalPosEmb(3, frequencies)(TIMES), F.pad(expected, (0, 1)))


def test_sinusoids_equal_the_specification():
    assert_close(SinusoidalPosEmb(16)(TIMES), specification.SinusoidalPosEmb(16)(TIMES), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_sinusoids_take_integers(dtype):
    assert_close(
        SinusoidalPosEmb(8)(torch.tensor([3, 999], dtype=dtype)), SinusoidalPosEmb(8)(torch.tensor([3.0, 999.0]))
    )


@pytest.mark.parametrize("dim", [1, 0])
def test_sinusoids_need_two_channels(dim):
    with pytest.raises(ValueError, match=f"dim={dim} .*at least 2"):
        SinusoidalPosEmb(dim)


def test_time_mlp():
    mlp = randomise(TimeMLP(16, "half"))
    hidden = F.silu(F.linear(SinusoidalPosEmb(16, "half")(TIMES), mlp[1].weight, mlp[1].bias))
    assert_close(mlp(TIMES), F.linear(hidden, mlp[3].weight, mlp[3].bias))
    assert mlp(TIMES).shape == (len(TIMES), 64)


def test_time_mlp_in_bfloat16_still_tells_neighbouring_timesteps_apart():
    mlp = randomise(TimeMLP(16)).bfloat16()
    out = mlp(torch.tensor([998, 999, 1000]))
    assert out.dtype == torch.bfloat16
    assert (out[0] - out[1]).abs().max() > 0.05
    assert (out[1] - out[2]).abs().max() > 0.05


# ---- resampling ----------------------------------------------------------------------------------------------------

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ODD_AND_EVEN = [(1,), (6,), (7,), (1, 1), (8, 6), (7, 4), (5, 9), (4, 3, 5)]


def halved(shape):
    return [(n + 1) // 2 for n in shape]


@pytest.mark.parametrize("size", ODD_AND_EVEN)
@pytest.mark.parametrize("layer", ["conv", "conv_asymmetric", "avgpool"])
def test_every_downsampling_gives_half_the_size_rounded_up(layer, size):
    down = AveragePool() if layer == "avgpool" else Downsample(3, len(size), asymmetric=layer == "conv_asymmetric")
    assert list(down(torch.randn(2, 3, *size)).shape[2:]) == halved(size)


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


@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_average_pool(size):
    x = torch.randn(2, 3, *size)
    expected = x
    for axis, n in enumerate(size, start=2):  # one axis after the other; the last entry of an odd one counts twice
        i = torch.arange(0, n, 2)
        expected = (expected.index_select(axis, i) + expected.index_select(axis, (i + 1).clamp(max=n - 1))) / 2
    assert_close(average_pool(x), expected)


@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_nearest_equals_interpolate_to_the_size_of_the_skip(size):
    x = torch.randn(2, 3, *halved(size))
    assert torch.equal(upsample_nearest(x, size), F.interpolate(x, size=size, mode="nearest"))
    assert torch.equal(upsample_nearest(x), F.interpolate(x, scale_factor=2, mode="nearest"))


@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_nearest_upsample_is_repetition_then_convolution(size):
    up, x = randomise(NearestUpsample(3, len(size))), torch.randn(2, 3, *halved(size))
    repeated = F.interpolate(x, size=size, mode="nearest")
    assert_close(up(x, size=size), CONV[len(size)](repeated, up.conv.weight, up.conv.bias, padding=1))


@pytest.mark.parametrize("size", [None, (8, 6), (7, 5), (8, 5)])
def test_nearest_upsample_equals_diffusers(size):
    up, x = randomise(NearestUpsample(4)), torch.randn(2, 4, 4, 3)
    peer = Upsample2D(4, use_conv=True)
    peer.load_state_dict(up.state_dict())
    assert_close(up(x, size=size), peer(x, output_size=size))


@pytest.mark.parametrize("size", ODD_AND_EVEN)
def test_transposed_upsample_is_the_adjoint_of_a_strided_convolution(size):
    """<up(x), y> = <x, conv(y)> where conv has the same weights, kernel 4, stride 2, padding 1 (PyTorch's definition).

    On odd sizes y is zero beyond the cut.
    """
    up, x, y = randomise(TransposedUpsample(3, len(size))), torch.randn(2, 3, *halved(size)), torch.randn(2, 3, *size)
    torch.nn.init.zeros_(up.conv.bias)
    padded = F.pad(y, [p for n in reversed(size) for p in (0, n % 2)])
    down = CONV[len(size)](padded, up.conv.weight, stride=2, padding=1)
    assert up(x, size=size).shape == y.shape
    assert_close((up(x, size=size) * y).sum(), (x * down).sum(), rtol=1e-4, atol=1e-4)


def test_crop_takes_the_first_entries():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(crop(x, (3, 5)), x[:, :, :3, :5])
    assert torch.equal(crop(x, None), x)


# ---- residual block ------------------------------------------------------------------------------------------------

MODULATIONS = [("add", "default"), ("scale_shift", "scale_shift")]


@pytest.mark.parametrize(("in_ch", "out_ch"), [(64, 128), (64, 64)])
def test_resblock_equals_the_specification(in_ch, out_ch):
    block, x, t_emb = ResBlock(in_ch, out_ch, 256), torch.randn(2, in_ch, 6, 5), torch.randn(2, 256)
    assert block(x, t_emb).shape == (2, out_ch, 6, 5)
    peer = specification.ResBlock(in_ch, out_ch, 256)
    peer.load_state_dict(randomise(block).state_dict())
    assert_close(block.eval()(x, t_emb), peer.eval()(x, t_emb))


@pytest.mark.parametrize("train", [True, False])
def test_resblock_drops_out_before_the_second_convolution(train):
    block, x, t_emb = randomise(ResBlock(32, 32, 8, 0.5)).train(train), torch.randn(2, 32, 4, 4), torch.randn(2, 8)
    peer = specification.ResBlock(32, 32, 8, 0.5).train(train)
    peer.load_state_dict(block.state_dict())
    torch.manual_seed(1)
    out = block(x, t_emb)
    torch.manual_seed(1)
    mask = dropout_mask(x, 0.5)
    if train:
        peer.dropout.register_forward_hook(lambda module, args, _: torch.where(mask, args[0], 0.0) / 0.5)
    assert_close(out, peer(x, t_emb))
    assert torch.equal(out, block(x, t_emb)) != train


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_mask(p, layout):
    """Every value is kept with the same probability, apart from all others: those of the same draw, above all."""
    like = torch.empty(8, 16, 31, 33).to(memory_format=layout)
    mask = dropout_mask(like, p)
    assert mask.is_contiguous(memory_format=layout)
    assert mask.shape == like.shape
    memory = mask if layout == torch.contiguous_format else mask.permute(0, 2, 3, 1)
    lanes = memory.reshape(-1, 4).double()
    error = 5 * (p * (1 - p) / len(lanes)) ** 0.5  # five standard deviations
    assert ((lanes.mean(0) - (1 - p)).abs() < error).all()
    assert (lanes.T.corrcoef() - torch.eye(4)).abs().max() < 5 / len(lanes) ** 0.5


@pytest.mark.parametrize(("modulation", "theirs"), MODULATIONS)
@pytest.mark.parametrize("resample", ["none", "down", "up"])
@pytest.mark.parametrize(("in_ch", "out_ch"), [(8, 12), (8, 8)])
def test_resblock_equals_diffusers(modulation, theirs, resample, in_ch, out_ch):
    block = ResBlock(in_ch, out_ch, 16, 0.0, norm_groups=4, norm_eps=1e-3, modulation=modulation, resample=resample)
    peer = ResnetBlock2D(
        in_channels=in_ch,
        out_channels=out_ch,
        temb_channels=16,
        groups=4,
        eps=1e-3,
        time_embedding_norm=theirs,
        down=resample == "down",
        up=resample == "up",
    )
    renamed = {"time_mlp": "time_emb_proj", "skip": "conv_shortcut"}
    split = [(name.split("."), p) for name, p in randomise(block).state_dict().items()]
    peer.load_state_dict({f"{renamed.get(module, module)}.{leaf}": p for (module, leaf), p in split})
    x, emb = torch.randn(2, in_ch, 6, 4), torch.randn(2, 16)
    assert relative_error(block(x, emb), peer(x, emb)) < 2e-6


@pytest.mark.parametrize("size", ODD_AND_EVEN)
@pytest.mark.parametrize(("modulation", "theirs"), MODULATIONS)
def test_resblock_resamples_any_number_of_axes_and_any_size(size, modulation, theirs):
    dims, emb = len(size), torch.randn(2, 8)
    down = randomise(ResBlock(4, 6, 8, dims=dims, norm_groups=2, modulation=modulation, resample="down")).eval()
    up = randomise(ResBlock(6, 4, 8, dims=dims, norm_groups=2, modulation=modulation, resample="up")).eval()
    x = torch.randn(2, 4, *size)
    low = down(x, emb)
    assert list(low.shape[2:]) == halved(size)
    assert up(low, emb, size=size).shape == x.shape


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_a_new_resblock_is_the_identity(modulation):
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ResBlock(8, 8, 16, modulation=modulation)(x, torch.randn(2, 16)), x)


def test_block_runs_its_layers_in_order():
    layers = [randomise(Downsample(4), 1), randomise(ResBlock(4, 6, 8, norm_groups=2), 2).eval(), TransposedUpsample(6)]
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 8)
    expected = layers[2](layers[1](layers[0](x), emb), size=(5, 6))
    assert_close(Block(layers)(x, emb, None, (5, 6)), expected)
