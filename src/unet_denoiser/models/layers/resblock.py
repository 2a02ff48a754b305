"""The residual block of a `UNet`.

Every layer is called the same way, `layer(x, emb, context, size)`, and takes what it needs:

    x        (B, C, *spatial)     the features
    emb      (B, time_emb_dim)    time embedding, with the class and vector embeddings added
    context  Context              tokens for cross-attention
    size     spatial shape        output size of an upsampling: that of the skip, odd sizes included
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers.common import Size, add_inplace, zero_init
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.conv import CONV
from unet_denoiser.models.layers.norm import Activation, Modulation, group_norm, norm_act
from unet_denoiser.models.layers.recompute import recompute_input
from unet_denoiser.models.layers.resampling import average_pool, identity, upsample_nearest
from unet_denoiser.models.layers.rules import is_channels_last
from unet_denoiser.models.layers.traced import hashed_mask, is_generated


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, with a residual connection.

    h = conv1(silu(norm1(x))). With y from the embedding, modulation="add" computes h = norm2(h + y) (Ho et al. 2020);
    "scale_shift" computes h = y_s norm2(h) + y_b, where y_s = 1 + scale (AdaGN; Dhariwal and Nichol 2021, section 3.1).
    Then h = conv2(dropout(silu(h))), and the output is skip(x) + h.

    Args:
        in_ch, out_ch: channels; `skip` is a 1x1 convolution if they differ.
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
        emb = self.time_mlp(F.silu(emb))  # (B, out_ch or 2 out_ch)
        h = recompute_input(
            lambda x: self.resample(norm_act(self.norm1, x), size), self.conv1, x, norm=self.norm1
        )  # (B, out_ch, *spatial)
        # drawn here and not in `_activate`, which the backward pass calls again
        mask = draw_dropout_mask(h, self.dropout.p) if self.training and self.dropout.p else None
        modulation = emb.chunk(2, dim=1) if self.scale_shift else (emb,)
        h = recompute_input(self._activate, self.conv2, h, mask, *modulation, norm=self.norm2)
        return add_inplace(h, self.skip(self.resample(x, size)), self.conv2)

    def _activate(self, h: Tensor, mask: Tensor | None, *modulation: Tensor) -> Tensor:
        """Compute conv2's input: modulation, norm, SiLU, dropout."""
        kept = 1 - _to_fifteen_bits(self.dropout.p) / 2**15
        return norm_act(self.norm2, h, Modulation.of(*modulation), Activation(keep=mask, keep_scale=1 / kept))


class Block(nn.Sequential):
    """Layers that run one after the other: one entry of the encoder or decoder.

    No nn.ModuleList, which FSDP2 of torch 2.11 and earlier refuses to shard.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Context | None = None, size: Size = None
    ) -> Tensor:
        for layer in self:
            x = layer(x, emb, context, size)
        return x


def draw_dropout_mask(like: Tensor, p: float) -> Tensor:
    """Draw the values that dropout keeps: bool, of the shape and layout of `like`; p is rounded to 1/32768.

    One draw of 63 bits serves four values: on a CPU, a fifth of the time of torch's own mask.
    """
    if torch.compiler.is_compiling():  # a generated kernel draws without a mask in memory
        return hashed_mask(like, p) if is_generated(like) else torch.rand_like(like) >= p
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_()
    fifteen_bits = draws.view(torch.int16)[: like.numel()] & (2**15 - 1)  # random_ leaves the sign bit of int64 zero
    keep = fifteen_bits >= _to_fifteen_bits(p)
    if is_channels_last(like):
        return keep.view(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    return keep.view(like.shape)


def _to_fifteen_bits(p: float) -> int:
    return min(round(p * 2**15), 2**15 - 1)
