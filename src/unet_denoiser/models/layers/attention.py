"""Multi-head attention (Vaswani et al. 2017), and the three kinds of layer that a `UNet` builds from it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers.common import Emb, Size, zero_init
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.norm import group_norm
from unet_denoiser.models.layers.recompute import recompute_input
from unet_denoiser.models.layers.rules import products_pay


def to_tokens(x: Tensor) -> Tensor:
    """Reshape (B, C, *spatial) to (B, N, C), N positions in row-major order."""
    return x.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, like: Tensor) -> Tensor:
    """Reshape (B, N, C) to the shape of `like`, (B, C, *spatial)."""
    return tokens.transpose(1, 2).reshape(like.shape)


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to context tokens, or to themselves if no context is given.

    softmax(Q K^T / sqrt(head_dim)) V for each head (Vaswani et al. 2017, equation 1 and section 3.2.2).

    Args:
        query_dim: width of the tokens and of the output.
        context_dim: width of the context tokens; equal to `query_dim` for self-attention.
        num_heads: number of heads; divides `query_dim`.
        qkv_bias: give the projections to queries, keys and values a bias (Stable Diffusion's have none).

    Shapes: x (B, N, query_dim), context (B, S, context_dim), mask (B, S) bool, False for tokens to ignore ->
    (B, N, query_dim). `projected` are keys and values from `keys_and_values`, which then are not computed.

    Raises:
        ValueError: num_heads does not divide query_dim.
    """

    def __init__(self, query_dim: int, context_dim: int, num_heads: int = 8, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if query_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide query_dim={query_dim}")
        self.num_heads = num_heads
        self.head_dim = query_dim // num_heads
        self.to_q = nn.Linear(query_dim, query_dim, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, query_dim, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, query_dim, bias=qkv_bias)
        self.to_out = nn.Linear(query_dim, query_dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q = self._split_heads(self.to_q(x))  # (B, heads, N, head_dim)
        k, v = projected or self.keys_and_values(x if context is None else context)  # (B, heads, S, head_dim)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, S)
        out = attend(q, k, v, mask)  # (B, heads, N, head_dim)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of a context (B, S, context_dim), both (B, heads, S, head_dim)."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, N, heads * head_dim) to (B, heads, N, head_dim)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute softmax(q k^T / sqrt(head_dim)) v; q (B, heads, N, head_dim), mask (B, 1, 1, S) bool."""
    if not products_pay(q, k):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, N, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class SelfAttention(nn.Module):
    """Attention of every position to every other: x + attention(norm(x)); x (B, channels, *spatial)."""

    def __init__(self, channels: int, num_heads: int = 8, *, norm_groups: int = 32, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups, norm_eps)
        self.attn = CrossAttention(channels, channels, num_heads)
        zero_init(self.attn.to_out)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return x + to_grid(self.attn(to_tokens(self.norm(x))), x)


class ContextAttention(nn.Module):
    """Attention of every position to the context: x + attention(norm(x), context); x (B, channels, *spatial)."""

    def __init__(
        self, channels: int, context_dim: int, num_heads: int = 8, *, norm_groups: int = 32, norm_eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups, norm_eps)
        self.attn = CrossAttention(channels, context_dim, num_heads)
        zero_init(self.attn.to_out)

    def forward(self, x: Tensor, emb: Tensor | None, context: Context, size: Size = None) -> Tensor:
        return x + to_grid(self.attn(to_tokens(self.norm(x)), *context.arguments_for(self.attn)), x)


class SpatialTransformer(nn.Module):
    """Stable Diffusion's attention: transformer blocks between two projections, with a residual connection around all.

    x (B, channels, *spatial); context tokens of width `context_dim`, or context_dim=None for self-attention alone
    (Rombach et al. 2022, section 3.3).
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 8,
        context_dim: int | None = None,
        depth: int = 1,
        *,
        cross_only: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm = group_norm(channels, norm_groups, eps=1e-6)  # 1e-6 in all checkpoints, whatever norm_eps is
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim, cross_only) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        tokens = self.proj_in(to_tokens(self.norm(x)))  # (B, N, channels)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_grid(self.proj_out(tokens), x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, and a gated feed-forward layer; tokens (B, N, dim).

    With `cross_only` the first attention attends to the context too (Stable Diffusion's upscaler).
    """

    def __init__(self, dim: int, num_heads: int, context_dim: int | None, cross_only: bool = False) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, context_dim if cross_only and context_dim else dim, num_heads, qkv_bias=False)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(dim)
            self.attn2 = CrossAttention(dim, context_dim, num_heads, qkv_bias=False)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        first = context.arguments_for(self.attn1) if self.cross_only and context is not None else ()
        x = x + self.attn1(self.norm1(x), *first)
        if context is not None:
            x = x + self.attn2(self.norm2(x), *context.arguments_for(self.attn2))
        return x + self.ff(self.norm3(x))


class FeedForward(nn.Module):
    """GEGLU feed-forward layer of inner width 4 * dim: value * gelu(gate) (Shazeer 2020, equation 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 8 * dim)
        self.out = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return recompute_input(_geglu, self.out, self.proj(x))


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)  # (B, N, 4 * dim) each
    return value * F.gelu(gate)


def project_context(network: nn.Module, context: Context) -> Context:
    """Add the keys and values that the network's layers compute from the tokens, which every call then shares."""
    layers = [layer for module in network.modules() for layer in _context_layers(module)]
    return context._replace(projected={layer: layer.keys_and_values(context.tokens) for layer in layers})


def _context_layers(module: nn.Module) -> Iterator[CrossAttention]:
    if isinstance(module, ContextAttention):
        yield module.attn
    if isinstance(module, TransformerBlock) and hasattr(module, "attn2"):
        yield module.attn2
        if module.cross_only:
            yield module.attn1
