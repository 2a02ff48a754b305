"""Image and mask files, prepared as in training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.load import load_autoencoder
from unet_denoiser.data.transforms import augment, make_fill, open_image, to_float, to_pixels
from unet_denoiser.data.wrappers.concat import enlarge


def read_concat(config: DataConfig, channels: int, image: Path) -> Tensor:
    """(1, C2, H, W) `concat` from a picture file, prepared as in training; a small one to enlarge may have any size.

    Args:
        config: that of the run.
        channels: what its network takes beside the noisy picture.

    Raises:
        ValueError: a file that is no picture, or of no use to this run.
    """
    kind = config.concat_kind
    if kind is None:
        raise ValueError(f"concat_image={image}: the run was trained without concat")
    if kind.name == "inpainting":
        raise ValueError(f"concat_image={image}: the run was trained for inpainting; give image, and mask or outpaint")
    wanted = (config.channels or 3) if config.vae is not None else channels
    if kind.name == "downscaled":
        small = read_picture(config, wanted, image, as_it_is=True)
        picture = enlarge(small, tuple(n * kind.factor for n in small.shape[2:]))
    else:
        picture = read_picture(config, wanted, image)
    return picture if config.vae is None else load_autoencoder(config).encode(picture)


def read_picture(
    config: DataConfig, channels: int, image: str | Path, size: Sequence[int] | None = None, *, as_it_is: bool = False
) -> Tensor:
    """(1, channels, H, W) of a picture file in [-1, 1], prepared as in training.

    Args:
        size: height and width (default: the configuration's).
        as_it_is: keep the file's.

    Raises:
        ValueError: a file that is no picture.
    """
    opened = open_image(str(image))
    if as_it_is:
        return to_float(to_pixels(opened, channels, (opened.height, opened.width), "stretch", config.background))[None]
    size = tuple(size or config.image_size or ())  # type: ignore[arg-type]  # a run's is a tuple
    pixels = to_pixels(opened, channels, size, config.resize_mode, config.background)
    return augment(to_float(pixels), size, config, background=make_fill(config.background, channels))[None]


def read_mask(config: DataConfig, mask: str | Path, size: Sequence[int]) -> Tensor:
    """(1, 1, H, W) bool of a picture file, True where it is more white than black; prepared as pictures are.

    Raises:
        ValueError: a file that is no picture, or has nothing white.
    """
    size = tuple(size)
    drawn = to_float(to_pixels(open_image(str(mask)), 1, size, config.resize_mode, "black"))
    white = augment(drawn, size, config, background=-torch.ones(1))[None] > 0
    if not white.any():
        raise ValueError(f"mask={mask} has nothing white, so there is nothing to paint")
    return white
