"""The attention layers, against torch's own, a direct formula, the specification and diffusers' transformer."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel
from torch.autograd import gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close

from support import specification
from support.convolutions import take_each_way
from support.networks import as_multihead, randomise, relative_error
from unet_denoiser import CrossAttention, SelfAttention
from unet_denoiser.models.layers.attention import (
    ContextAttention,
    FeedForward,
    SpatialTransformer,
    to_grid,
    to_tokens,
)
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.rules import plain_convolutions

SIZES = [(1,), (7,), (1, 1), (4, 3), (2, 3, 5)]


@pytest.mark.parametrize("num_heads", [1, 2, 8])
@pytest.mark.parametrize("context_dim", [16, 10])
def test_cross_attention_equals_torch(num_heads, context_dim):
    attn = randomise(CrossAttention(16, context_dim, num_heads))
    x, context, mask = torch.randn(3, 5, 16), torch.randn(3, 4, context_dim), torch.rand(3, 4) < 0.7
    mask[:, 0] = True
    peer = as_multihead(attn)
    assert_close(attn(x, context), peer(x, context, context)[0])
    assert_close(attn(x, context, mask), peer(x, context, context, key_padding_mask=~mask)[0])


def test_cross_attention_without_context_attends_to_itself():
    attn, x = randomise(CrossAttention(16, 16, 4)), torch.randn(3, 5, 16)
    assert_close(attn(x), as_multihead(attn)(x, x, x)[0])


def test_cross_attention_equals_the_formula():
    """softmax(q k^T / sqrt(d)) v for each head, which owns d neighbouring channels (Vaswani et al. 2017)."""
    attn, x, context = randomise(CrossAttention(12, 6, 3)), torch.randn(2, 5, 12), torch.randn(2, 4, 6)
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(4), dim=-1)
        heads.append(weights @ v[..., part])
    assert_close(attn(x, context), attn.to_out(torch.cat(heads, dim=-1)))


def test_cross_attention_equals_the_specification():
    attn, tokens, context = CrossAttention(64, 768), torch.randn(2, 9, 64), torch.randn(2, 7, 768)
    peer = specification.CrossAttention(64, 768)
    peer.load_state_dict(randomise(attn).state_dict())
    assert_close(attn(tokens, context), peer(tokens, context))


def test_masked_tokens_have_no_influence():
    attn, x, context = randomise(CrossAttention(16, 8, 2)), torch.randn(2, 5, 16), torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, False, False], [True, False, True, True]])
    changed = torch.where(mask[..., None], context, torch.randn(2, 4, 8) * 100)
    assert torch.equal(attn(x, context, mask), attn(x, changed, mask))
    assert_close(attn(x, context, mask)[:1], attn(x[:1], context[:1, :2]))
    assert (attn(x, context, mask) - attn(x, context)).abs().max() > 0.01


def test_without_biases_only_the_projections_lack_them():
    names = {name for name, _ in CrossAttention(8, 8, 2, qkv_bias=False).named_parameters()}
    assert names == {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias"}


def test_refuses_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="num_heads=8 does not divide query_dim=20"):
        CrossAttention(20, 20)


def test_tokens_are_the_positions_in_row_major_order():
    x = torch.randn(2, 3, 4, 5)
    tokens = to_tokens(x)
    assert_close(tokens[:, 7], x[:, :, 1, 2])
    assert torch.equal(to_grid(tokens, x), x)


# ---- layers --------------------------------------------------------------------------------------------------------


def test_self_attention_equals_the_specification():
    attn, x = randomise(SelfAttention(64)), torch.randn(2, 64, 4, 5)
    assert attn(x).shape == x.shape
    peer = specification.SelfAttention(64)
    peer.attn.load_state_dict(as_multihead(attn.attn).state_dict())
    peer.norm.load_state_dict(attn.norm.state_dict())
    assert_close(attn(x), peer(x))


@pytest.mark.parametrize("size", SIZES)
def test_self_attention_on_any_number_of_axes(size):
    """Attention knows no positions: a grid of any shape equals the same tokens in a row."""
    attn, x = randomise(SelfAttention(12, 3, norm_groups=4, norm_eps=1e-3)), torch.randn(2, 12, *size)
    tokens = F.group_norm(x, 4, attn.norm.weight, attn.norm.bias, 1e-3).flatten(2).mT
    assert_close(attn(x), x + as_multihead(attn.attn)(tokens, tokens, tokens)[0].mT.reshape(x.shape))


@pytest.mark.parametrize("size", SIZES)
def test_context_attention(size):
    attn = randomise(ContextAttention(12, 5, 3, norm_groups=4, norm_eps=1e-3))
    x, tokens = torch.randn(2, 12, *size), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, True, False], [False, True, False, False]])
    query = F.group_norm(x, 4, attn.norm.weight, attn.norm.bias, 1e-3).flatten(2).mT
    attended = as_multihead(attn.attn)(query, tokens, tokens, key_padding_mask=~mask)[0]
    assert_close(attn(x, None, Context(tokens, mask)), x + attended.mT.reshape(x.shape))


@pytest.mark.parametrize("context_dim", [None, 6])
@pytest.mark.parametrize("depth", [1, 2])
def test_spatial_transformer_equals_diffusers(context_dim, depth):
    ours = randomise(SpatialTransformer(16, 2, context_dim, depth, norm_groups=4))
    peer = Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=depth,
        norm_num_groups=4,
        cross_attention_dim=context_dim,
        use_linear_projection=True,
    )
    renames = {"to_out.": "to_out.0.", "ff.proj.": "ff.net.0.proj.", "ff.out.": "ff.net.2."}
    state = dict(ours.state_dict())
    for old, new in renames.items():
        state = {name.replace(old, new): p for name, p in state.items()}
    peer.load_state_dict(state)
    x, tokens = torch.randn(2, 16, 4, 5), torch.randn(2, 3, 6)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    if context_dim is None:
        assert relative_error(ours(x), peer(x, return_dict=False)[0]) < 2e-6
    else:
        expected = peer(x, tokens, encoder_attention_mask=mask, return_dict=False)[0]
        assert relative_error(ours(x, None, Context(tokens, mask)), expected) < 2e-6


@pytest.mark.parametrize(
    "layer",
    [SelfAttention(8, 2), ContextAttention(8, 5, 2), SpatialTransformer(8, 2, 5, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_new_layer_is_the_identity(layer):
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(layer(x, None, Context(torch.randn(2, 4, 5))), x)


@pytest.mark.parametrize("autocast", [False, True])
def test_feed_forward_recomputes_its_gate(autocast, monkeypatch):
    take_each_way(monkeypatch)
    layer = randomise(FeedForward(8))
    x, weights = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)

    def run():
        kept = []
        layer.zero_grad()
        with torch.autocast("cpu", enabled=autocast), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = layer(x)
        grads = torch.autograd.grad((out.float() * weights).sum(), [x, *layer.parameters()])
        widths = [t.shape[-1] for t in kept if t.shape[:2] == x.shape[:2] or t.shape[0] == 10]
        return [out, *grads], widths

    (ours, kept), (plain, kept_plainly) = run(), plain_convolutions()(run)()
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a.float(), b.float()) < (2e-2 if autocast else 1e-6)
    assert kept.count(32) == 0 < kept_plainly.count(32)  # the gate, and its product with the value


def test_second_derivatives_of_the_feed_forward_layer(monkeypatch):
    take_each_way(monkeypatch)
    layer = randomise(FeedForward(3)).double()
    assert gradgradcheck(layer, torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True))
