"""Residual blocks against the specification and diffusers, and dropout masks."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch.testing import assert_close

from support import specification
from support.networks import ODD_AND_EVEN_SIZES, half_size, randomise, relative_error
from unet_denoiser import ResBlock
from unet_denoiser.models.layers.resampling import Downsample, TransposedUpsample
from unet_denoiser.models.layers.resblock import Block, draw_dropout_mask

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
    mask = draw_dropout_mask(x, 0.5)
    if train:
        peer.dropout.register_forward_hook(lambda module, args, _: torch.where(mask, args[0], 0.0) / 0.5)
    assert_close(out, peer(x, t_emb))
    assert torch.equal(out, block(x, t_emb)) != train


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_mask(p, layout):
    """Every value is kept with the same probability, apart from all others: those of the same draw, above all."""
    like = torch.empty(8, 16, 31, 33).to(memory_format=layout)
    mask = draw_dropout_mask(like, p)
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


@pytest.mark.parametrize("size", ODD_AND_EVEN_SIZES)
@pytest.mark.parametrize(("modulation", "theirs"), MODULATIONS)
def test_resblock_resamples_any_number_of_axes_and_any_size(size, modulation, theirs):
    dims, emb = len(size), torch.randn(2, 8)
    down = randomise(ResBlock(4, 6, 8, dims=dims, norm_groups=2, modulation=modulation, resample="down")).eval()
    up = randomise(ResBlock(6, 4, 8, dims=dims, norm_groups=2, modulation=modulation, resample="up")).eval()
    x = torch.randn(2, 4, *size)
    low = down(x, emb)
    assert list(low.shape[2:]) == half_size(size)
    assert up(low, emb, size=size).shape == x.shape


@pytest.mark.parametrize("modulation", ["add", "scale_shift"])
def test_a_new_resblock_is_the_identity(modulation):
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(ResBlock(8, 8, 16, modulation=modulation)(x, torch.randn(2, 16)), x)


def test_block_runs_its_layers_in_order():
    layers = [randomise(Downsample(4), 1), randomise(ResBlock(4, 6, 8, norm_groups=2), 2).eval(), TransposedUpsample(6)]
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 8)
    expected = layers[2](layers[1](layers[0](x), emb), size=(5, 6))
    assert_close(Block(*layers)(x, emb, None, (5, 6)), expected)
