"""A second image as input channels, "concat": for super-resolution, inpainting and image-to-image translation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamIndex


def lower_resolution(images: Tensor, factor: int) -> Tensor:
    """Scale images (B, C, H, W) down to 1 / factor of their size and up again: the input of super-resolution."""
    if any(n % factor for n in images.shape[2:]):
        raise ValueError(f"concat='downscaled:{factor}': the size {tuple(images.shape[2:])} is no multiple of it")
    small = F.interpolate(images, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return enlarge(small, images.shape[2:])


def enlarge(images: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Scale small images (B, C, h, w) up to `size`, as `lower_resolution` does: the `concat` of samples."""
    return F.interpolate(images.clamp(-1, 1), size=tuple(size), mode="bicubic").clamp(-1, 1)


def mask_images(images: Tensor, mask: Tensor) -> Tensor:
    """Return the `concat` of inpainting (B, 1 + C, H, W): the mask as 1 and -1, then the images with zeros in it.

    Args:
        images: (B, C, H, W) in [-1, 1].
        mask: (B, 1, H, W) bool, True where to paint.
    """
    return torch.cat([mask.to(images) * 2 - 1, torch.where(mask.bool(), 0, images)], dim=1)


def draw_mask(size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Draw a mask (1, H, W) bool, True where to paint: a rectangle or brush strokes, with equal probability.

    A rectangle's sides are between a quarter of the image's and all of it. Strokes are a random walk of a round brush,
    like the free-form masks of Yu et al. 2019.
    """
    height, width = size
    y, x = np.mgrid[:height, :width]
    if rng.random() < 0.5:
        h, w = (int(rng.integers(-(-n // 4), n + 1)) for n in size)
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        mask = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    else:
        mask = np.zeros(size, bool)
        shorter = min(size)
        radius = max(0.5, shorter * rng.uniform(0.05, 0.15))
        centre, angle = rng.uniform((0, 0), size), rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(10, 40))):
            mask |= (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
            angle += rng.normal(0, 0.5)
            step = np.array([np.sin(angle), np.cos(angle)]) * max(radius, shorter / 16)
            centre = np.clip(centre + step, 0, np.array(size) - 1)
        if not mask.any():
            mask[tuple(centre.astype(int))] = True
    return torch.from_numpy(mask)[None]


class ConcatConditionDataset(DatasetWrapper):
    """Adds "concat" (C2, H, W) to each item: channels in [-1, 1] that the network sees beside x_t.

    Args:
        paired: the second images, item by item, if `config.concat` is a folder.

    Raises:
        ValueError: data that are not images, or whose size is no multiple of the factor.
    """

    def __init__(self, data: ImageDataset, config: DataConfig, paired: ImageDataset | None = None) -> None:
        super().__init__(data)
        if len(data.image_size) != 2:
            raise ValueError(f"concat={config.concat}: the data have {len(data.image_size)} axes; images have 2")
        kind = config.concat_kind
        assert kind is not None
        self.paired, self.inpainting, self.factor = paired, kind.name == "inpainting", kind.factor
        if kind.name == "downscaled":
            lower_resolution(torch.zeros(1, 1, *data.image_size), self.factor)  # raises if the size is no multiple
        self.concat_channels = data.channels + 1 if self.inpainting else (paired or data).channels

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        image = item["image"][None]  # (1, C, H, W)
        if self.inpainting:
            entropy = [index.seed, index.position] if isinstance(index, StreamIndex) else [index]
            # the last entry, 2, keeps these numbers apart from those of the item's augmentation
            mask = draw_mask(image.shape[2:], np.random.default_rng([*entropy, 0, 2]))
            concat = mask_images(image, mask[None])[0]
        elif self.paired is not None:
            concat = self.paired[index]["image"]
        else:
            concat = lower_resolution(image, self.factor)[0]
        return item | {"concat": concat}
