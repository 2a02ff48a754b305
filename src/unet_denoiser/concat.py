"""Pictures that the network sees beside the noisy one: super-resolution, inpainting, image to image.

They are channels in [-1, 1], of the samples' size, in an item's "concat".
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def downscaled(pictures: Tensor, factor: int) -> Tensor:
    """(B, C, H, W) pictures at 1 / factor of their size, then enlarged again: what super-resolution starts from."""
    if any(n % factor for n in pictures.shape[2:]):
        raise ValueError(f"concat='downscaled:{factor}': the size {tuple(pictures.shape[2:])} is no multiple of it")
    small = F.interpolate(pictures, scale_factor=1 / factor, mode="bicubic", antialias=True)
    return enlarged(small, pictures.shape[2:])


def enlarged(pictures: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """(B, C, h, w) small pictures as `concat` for samples of a size, as `downscaled` enlarges them."""
    return F.interpolate(pictures.clamp(-1, 1), size=tuple(size), mode="bicubic").clamp(-1, 1)


def masked(pictures: Tensor, mask: Tensor) -> Tensor:
    """(B, 1 + C, H, W): a mask (B, 1, H, W), True where to paint, as 1 and -1; then pictures with zeros there."""
    return torch.cat([mask.to(pictures) * 2 - 1, torch.where(mask.bool(), 0, pictures)], dim=1)


def random_mask(size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """(1, H, W) bool, True where to paint: a rectangle, or a brush's strokes, as often as each other.

    A rectangle has sides of a quarter to the whole of the picture's; strokes are a random walk with a round brush
    (like the free-form masks of Yu et al. 2019).
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
        place, angle = rng.uniform((0, 0), size), rng.uniform(0, 2 * np.pi)
        for _ in range(int(rng.integers(10, 40))):
            mask |= (y - place[0]) ** 2 + (x - place[1]) ** 2 <= radius**2
            angle += rng.normal(0, 0.5)
            step = np.array([np.sin(angle), np.cos(angle)]) * max(radius, shorter / 16)
            place = np.clip(place + step, 0, np.array(size) - 1)
        if not mask.any():
            mask[tuple(place.astype(int))] = True
    return torch.from_numpy(mask)[None]
