"""The parts of a `UNet` but for attention: time embedding, resampling, residual block.

Every layer is called the same way, `layer(x, emb, context, size)`, and takes what it needs:

    x        (B, C, *spatial)     the features
    emb      (B, time_emb_dim)    time embedding, with the class and vector embeddings added
    context  Context              tokens for cross-attention
    size     spatial shape        what an upsampling must come out at: its skip's, odd sizes included
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.conv import CONV, is_channels_last
from unet_denoiser.norm import group_norm
from unet_denoiser.recompute import recomputed, watched

CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d}


Size = Sequence[int] | None
Emb = Tensor | None


class Context(NamedTuple):
    """What cross-attention attends to.

    tokens: (B, S, context_dim). mask: (B, S) bool, True where a token counts, or None when all do; every row of it
    has at least one True (softmax over nothing is NaN): `UNet` sees to that. projected: keys and values of the tokens,
    for the layers whose are there already.
    """

    tokens: Tensor
    mask: Tensor | None = None
    projected: Mapping[nn.Module, tuple[Tensor, Tensor]] = {}  # nobody changes it

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """What `CrossAttention.forward` takes of it."""
        return self.tokens, self.mask, self.projected.get(layer)


def silu(x: Tensor, source: nn.Module) -> Tensor:
    """SiLU of what `source` returned and nothing else needs: in its place, where that is safe."""
    return F.silu(x, inplace=_may_overwrite(source))


def add(x: Tensor, y: Tensor, source: nn.Module) -> Tensor:
    """The sum of y and what `source` returned and nothing else needs: in its place, where that is safe."""
    return x.add_(y) if _may_overwrite(source) and x.dtype == y.dtype else x + y


def _may_overwrite(source: nn.Module) -> bool:
    """Whether the module has made what it returned, and neither autograd nor a hook keeps it."""
    made = isinstance(source, (nn.GroupNorm, *CONV.values()))
    return made and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or watched(source))


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Out of autocast, which would compute the embeddings' matrix products in half precision."""
    used = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if used else nullcontext()


def zero(module: nn.Module) -> nn.Module:
    """Zero the parameters, so that the residual branch this module ends starts as the identity (DDPM, ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


# ---- time ----------------------------------------------------------------------------------------------------------


class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of timesteps: (B,) integer or float -> (B, dim) float32, sines then cosines.

    Angles are t * 10000^(-k / (half - 1)) for k < half = dim // 2 with frequencies="endpoint" (DDPM), or
    t * 10000^(-k / half) with "half" (ADM). An odd `dim` is zero-padded on the right. (Vaswani et al. 2017, 3.5)

    Raises:
        ValueError: dim < 2.
    """

    def __init__(self, dim: int, frequencies: Literal["endpoint", "half"] = "endpoint") -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim={dim} has no room for a sine and a cosine; give at least 2")
        self.dim = dim
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        steps = max(half - 1, 1) if self.frequencies == "endpoint" else half
        # float32 throughout: bfloat16 could not tell timestep 999 from 1000
        k = torch.arange(half, device=t.device, dtype=torch.float32)
        # in the peers' order of operations: another rounds otherwise, by 6e-5 at t = 1000
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / steps)
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.dim % 2))


class TimeMLP(nn.Sequential):
    """Timesteps (B,) -> embedding (B, 4 * dim): sinusoids, plus `shift` (B, dim) if given, Linear, SiLU, Linear."""

    def __init__(self, dim: int, frequencies: Literal["endpoint", "half"] = "endpoint") -> None:
        super().__init__(
            SinusoidalPosEmb(dim, frequencies), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim)
        )

    def forward(self, t: Tensor, shift: Tensor | None = None) -> Tensor:
        sinusoids, linear1, act, linear2 = self
        h = sinusoids(t).to(linear1.weight.dtype)
        return linear2(act(linear1(h if shift is None else h + shift)))


# ---- resampling: any size down to ceil(size / 2), and back up to the size of the skip ------------------------------


class ClassEmbedding(nn.Embedding):
    """Embeddings of classes (B,), or their weighted sums for weights (B, num_classes)."""

    def forward(self, labels: Tensor) -> Tensor:
        return labels @ self.weight if labels.is_floating_point() else super().forward(labels)


def keep(x: Tensor, size: Size = None) -> Tensor:
    return x


def average_pool(x: Tensor, size: Size = None) -> Tensor:
    """Halve by averaging; the last row or column of an odd size counts twice."""
    if x.ndim < 5:
        return AVG_POOL[x.ndim - 2](x, 2, ceil_mode=True, count_include_pad=False)
    # the pooling of volumes refuses a length of 1; one column more leaves an even size as it is, since it stays unread
    return F.avg_pool3d(F.pad(x, (0, 1) * 3, mode="replicate"), 2)


def nearest(x: Tensor, size: Size = None) -> Tensor:
    """Double by repetition, then cut to `size`."""
    return crop(F.interpolate(x, size=[2 * n for n in x.shape[2:]]), size)


def crop(x: Tensor, size: Size) -> Tensor:
    """The first `size` entries of each spatial axis; all of them for None."""
    for axis, length in enumerate(size or (), start=2):
        if torch.compiler.is_exporting():
            # slicing asks torch.export to prove length <= 2 * ceil(length / 2), which is true but beyond it; training
            # must not do this: compiled by torch 2.13, its backward pass writes beyond its memory
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x


class AveragePool(nn.Module):
    """Downsampling without parameters."""

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return average_pool(x)


class Downsample(nn.Module):
    """Downsampling by a convolution of stride 2.

    Args:
        channels: in and out.
        asymmetric: pad right and bottom only, as DDPM's weights expect; else both sides.
    """

    def __init__(self, channels: int, dims: int = 2, asymmetric: bool = False) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        # an even size needs one column of padding and an odd one two; with two, an even size leaves the second unread
        self.pad = (0, 2) * dims if asymmetric else (0, 0)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class TransposedUpsample(nn.Module):
    """Upsampling by a transposed convolution of kernel 4 and stride 2, cut to the size of the skip."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv = CONV_TRANSPOSE[dims](channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return crop(self.conv(x), size)


class NearestUpsample(nn.Module):
    """Upsampling by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return recomputed(lambda x: nearest(x, size), self.conv, x)


# ---- residual block ------------------------------------------------------------------------------------------------


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Where dropout keeps a value: bool, of the shape and layout of `like`; p counts in steps of 1/32768.

    One draw of 63 bits serves four values; on a CPU that takes a fifth of the time of torch's own mask.
    """
    if torch.compiler.is_compiling():  # a generated kernel draws where it needs them
        return torch.rand_like(like) >= p
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_()
    fifteen_bits = draws.view(torch.int16)[: like.numel()] & (2**15 - 1)  # the sign of a draw is always the same
    keep = fifteen_bits >= _of_fifteen_bits(p)
    if is_channels_last(like):
        return keep.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return keep.view(like.shape)


def _of_fifteen_bits(p: float) -> int:
    return min(round(p * 2**15), 2**15 - 1)


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, with a residual connection.

    h = conv1(silu(norm1(x))); the embedding is added to h ("add") or, after norm2, scales and shifts it
    ("scale_shift"; ADM, Dhariwal and Nichol 2021, AdaGN); h = conv2(dropout(silu(h))); out = skip(x) + h.

    Args:
        in_ch, out_ch: channels; `skip` is a 1x1 convolution where they differ.
        time_emb_dim: width of the embedding.
        resample: "down" or "up" resample both h and x before conv1 (ADM's resblock_updown).

    Shapes: x (B, in_ch, *spatial), emb (B, time_emb_dim) -> (B, out_ch, *spatial).
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        time_emb_dim: int,
        dropout: float = 0.1,
        *,
        dims: int = 2,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        modulation: Literal["add", "scale_shift"] = "add",
        resample: Literal["none", "down", "up"] = "none",
    ) -> None:
        super().__init__()
        self.scale_shift = modulation == "scale_shift"
        self.resample = {"none": keep, "down": average_pool, "up": nearest}[resample]
        self.norm1 = group_norm(in_ch, norm_groups, norm_eps)
        self.conv1 = CONV[dims](in_ch, out_ch, 3, padding=1)
        self.time_mlp = nn.Linear(time_emb_dim, 2 * out_ch if self.scale_shift else out_ch)
        self.norm2 = group_norm(out_ch, norm_groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(CONV[dims](out_ch, out_ch, 3, padding=1))
        self.skip = nn.Identity() if in_ch == out_ch else CONV[dims](in_ch, out_ch, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None, size: Size = None) -> Tensor:
        emb = self.time_mlp(F.silu(emb))
        emb = emb.reshape(*emb.shape, *[1] * (x.ndim - 2))
        h = recomputed(lambda x: self.resample(silu(self.norm1(x), self.norm1), size), self.conv1, x, norm=self.norm1)
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
        else:
            h, scale, shift = add(h, emb, self.conv1), None, None
        # drawn here, as the backward pass calls `_activate` again
        mask = dropout_mask(h, self.dropout.p) if self.training and self.dropout.p else None
        h = recomputed(self._activate, self.conv2, h, scale, shift, mask, norm=self.norm2)
        return add(h, self.skip(self.resample(x, size)), self.conv2)

    def _activate(self, h: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm2(h)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift, h, 1 + scale)
        h = silu(h, self.norm2)
        return h if mask is None else torch.where(mask, h, 0.0).div_(1 - _of_fifteen_bits(self.dropout.p) / 2**15)


class Block(nn.ModuleList):
    """Layers that run one after the other: one entry of the encoder or decoder."""

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None, size: Size = None) -> Tensor:
        for layer in self:
            x = layer(x, emb, context, size)
        return x
