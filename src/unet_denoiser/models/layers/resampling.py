"""Downsampling to ceil(size / 2), and upsampling back to the size of the skip; any size, odd ones included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers.common import Emb, Size
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.layers.conv import CONV
from unet_denoiser.models.layers.recompute import recompute_input

CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d}


def identity(x: Tensor, size: Size = None) -> Tensor:
    return x


def average_pool(x: Tensor, size: Size = None) -> Tensor:
    """Average pairs of neighbours along each axis; the last entry of an odd size stands alone."""
    if x.ndim < 5:
        return AVG_POOL[x.ndim - 2](x, 2, ceil_mode=True, count_include_pad=False)
    # avg_pool3d refuses a length of 1; with even sizes, the repeated last entry remains unread
    return F.avg_pool3d(F.pad(x, (0, 1) * 3, mode="replicate"), 2)


def upsample_nearest(x: Tensor, size: Size = None) -> Tensor:
    """Repeat each entry twice along each axis, then crop to `size`."""
    return crop(F.interpolate(x, size=[2 * n for n in x.shape[2:]]), size)


def crop(x: Tensor, size: Size) -> Tensor:
    """Return the first `size` entries of each spatial axis; all of them for None."""
    for axis, length in enumerate(size or (), start=2):
        if torch.compiler.is_exporting():
            # torch.export cannot prove that slicing is valid, length <= 2 * ceil(length / 2). Not in training: compiled
            # by torch 2.13, the backward pass of index_select writes out of bounds
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x


class AveragePool(nn.Module):
    """Downsampling by averages, without parameters."""

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return average_pool(x)


class Downsample(nn.Module):
    """Downsampling by a 3x3 convolution of stride 2.

    Args:
        channels: of input and output.
        asymmetric: pad right and bottom only, as DDPM's weights expect; else both sides.
    """

    def __init__(self, channels: int, dims: int = 2, asymmetric: bool = False) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        # even sizes need one column of padding, odd sizes two; with two, even sizes leave the second one unread
        self.pad = (0, 2) * dims if asymmetric else (0, 0)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class TransposedUpsample(nn.Module):
    """Upsampling by a transposed convolution of kernel 4 and stride 2, cropped to the size of the skip."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv = CONV_TRANSPOSE[dims](channels, channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return crop(self.conv(x), size)


class NearestUpsample(nn.Module):
    """Upsampling by repetition to the size of the skip, then a 3x3 convolution."""

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Emb = None, context: Context | None = None, size: Size = None) -> Tensor:
        return recompute_input(lambda x: upsample_nearest(x, size), self.conv, x)
