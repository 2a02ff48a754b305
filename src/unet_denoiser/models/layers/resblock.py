"""The parts of a `UNet` but for attention: time embedding, resampling, residual block.

Every layer is called the same way, `layer(x, emb, context, size)`, and takes what it needs:

    x        (B, C, *spatial)     the features
    emb      (B, time_emb_dim)    time embedding, with the class and vector embeddings added
    context  Context              tokens for cross-attention
    size     spatial shape        what an upsampling must come out at: its skip's, odd sizes included
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers.common import Size, add_inplace, silu_inplace, zero_init
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.conv import CONV, is_channels_last
from unet_denoiser.models.layers.norm import group_norm
from unet_denoiser.models.layers.recompute import recomputed
from unet_denoiser.models.layers.resampling import average_pool, identity, upsample_nearest

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
        self.resample = {"none": identity, "down": average_pool, "up": upsample_nearest}[resample]
        self.norm1 = group_norm(in_ch, norm_groups, norm_eps)
        self.conv1 = CONV[dims](in_ch, out_ch, 3, padding=1)
        self.time_mlp = nn.Linear(time_emb_dim, 2 * out_ch if self.scale_shift else out_ch)
        self.norm2 = group_norm(out_ch, norm_groups, norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(CONV[dims](out_ch, out_ch, 3, padding=1))
        self.skip = nn.Identity() if in_ch == out_ch else CONV[dims](in_ch, out_ch, 1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None, size: Size = None) -> Tensor:
        emb = self.time_mlp(F.silu(emb))
        emb = emb.reshape(*emb.shape, *[1] * (x.ndim - 2))
        h = recomputed(
            lambda x: self.resample(silu_inplace(self.norm1(x), self.norm1), size), self.conv1, x, norm=self.norm1
        )
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
        else:
            h, scale, shift = add_inplace(h, emb, self.conv1), None, None
        # drawn here, as the backward pass calls `_activate` again
        mask = dropout_mask(h, self.dropout.p) if self.training and self.dropout.p else None
        h = recomputed(self._activate, self.conv2, h, scale, shift, mask, norm=self.norm2)
        return add_inplace(h, self.skip(self.resample(x, size)), self.conv2)

    def _activate(self, h: Tensor, scale: Tensor | None, shift: Tensor | None, mask: Tensor | None) -> Tensor:
        h = self.norm2(h)
        if scale is not None and shift is not None:
            h = torch.addcmul(shift, h, 1 + scale)
        h = silu_inplace(h, self.norm2)
        return h if mask is None else torch.where(mask, h, 0.0).div_(1 - _of_fifteen_bits(self.dropout.p) / 2**15)


class Block(nn.ModuleList):
    """Layers that run one after the other: one entry of the encoder or decoder."""

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None, size: Size = None) -> Tensor:
        for layer in self:
            x = layer(x, emb, context, size)
        return x
