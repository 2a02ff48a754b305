"""Image and mask files, prepared as in training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.data.transforms import augment, make_fill, open_image, to_float, to_pixels
from unet_denoiser.data.wrappers.concat import enlarge


def read_image(data: DataConfig, channels: int, image: str | Path, size: Sequence[int] | None) -> Tensor:
    """Read an image file as (1, channels, H, W) in [-1, 1], resized and cropped to a size as in training.

    A `size` of None keeps that of the file. ValueError if the file is no image.
    """
    opened = open_image(str(local_path(image)))
    if size is None:
        return to_float(to_pixels(opened, channels, (opened.height, opened.width), "stretch", data.background))[None]
    pixels = to_pixels(opened, channels, tuple(size), data.resize_mode, data.background)
    return augment(to_float(pixels), tuple(size), data, background=make_fill(data.background, channels))[None]


def read_concat(data: DataConfig, channels: int, image: Path) -> Tensor:
    """Read an image file as (1, channels, H, W) for `concat`; a small one to upscale may have any size.

    ValueError if the file is no image, or the network sees no such image.
    """
    kind = data.concat_kind
    if kind is None:
        raise ValueError(f"concat_image={image}: the run was trained without concat")
    if kind.name == "inpainting":
        raise ValueError(f"concat_image={image}: the run was trained for inpainting; give image, and mask or outpaint")
    if kind.name == "folder":
        return read_image(data, channels, image, data.image_size)  # type: ignore[arg-type]  # a run's is a tuple
    small = read_image(data, channels, image, None)
    return enlarge(small, tuple(n * kind.factor for n in small.shape[2:]))


def read_mask(data: DataConfig, mask: str | Path, size: Sequence[int]) -> Tensor:
    """Read a mask file as (1, 1, H, W) bool, True where it is more white than black; framed as images are.

    ValueError if the file is no image, or nothing in it is white.
    """
    size = tuple(size)
    drawn = to_float(to_pixels(open_image(str(local_path(mask)), colours=False), 1, size, data.resize_mode, "black"))
    white = augment(drawn, size, data, background=-torch.ones(1))[None] > 0
    if not white.any():
        raise ValueError(f"mask={mask} has nothing white, so there is nothing to paint")
    return white
