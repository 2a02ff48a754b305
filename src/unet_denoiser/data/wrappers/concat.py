"""Pictures that the network sees beside the noisy one: super-resolution, inpainting, image to image.

They are channels in [-1, 1], of the samples' size, in an item's "concat".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamIndex


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


class ConcatConditionDataset(DatasetWrapper):
    """Items get a "concat", channels that the network sees beside the noisy picture.

    Args:
        config: its `concat` says which channels.
        paired: the other pictures, where it is a folder.

    Raises:
        ValueError: data that are no pictures, or whose size a factor does not divide.
    """

    def __init__(self, data: ImageDataset, config: DataConfig, paired: ImageDataset | None = None) -> None:
        super().__init__(data)
        if len(data.image_size) != 2:
            raise ValueError(f"concat={config.concat}: the data have {len(data.image_size)} axes; pictures have 2")
        kind = config.concat_kind
        assert kind is not None
        self.paired, self.inpainting, self.factor = paired, kind.name == "inpainting", kind.factor
        if kind.name == "downscaled":
            downscaled(torch.zeros(1, 1, *data.image_size), self.factor)
        self.concat_channels = data.channels + 1 if self.inpainting else (paired or data).channels

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        picture = item["image"][None]
        if self.inpainting:
            entropy = [index.seed, index.position] if isinstance(index, StreamIndex) else [index]
            mask = random_mask(picture.shape[2:], np.random.default_rng([*entropy, 0, 2]))  # 2: not the augmentation's
            concat = masked(picture, mask[None])[0]
        elif self.paired is not None:
            concat = self.paired[index]["image"]
        else:
            concat = downscaled(picture, self.factor)[0]
        return item | {"concat": concat}


def _paired(
    folder: str, data: Any, config: DataConfig, load: Callable[[DataConfig], Any], has_vae: bool
) -> ImageDataset:
    """The pictures of a second folder, one for each of the data's; ValueError when the names differ."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"concat={folder} is neither 'downscaled:N', nor 'inpainting', nor a folder")
    if not hasattr(data, "files"):
        raise ValueError(f"concat={folder}: only a folder of images can be paired with another folder")
    plain = replace(config, class_names=None, label_column=None, caption_column=None, vector_columns=())
    channels = data.channels if has_vae else None
    paired: Any = load(replace(plain, source=folder, image_size=data.image_size, channels=channels))
    ours, theirs = ([str(Path(file).with_suffix("")) for file in each.files] for each in (data, paired))
    if unpaired := sorted(set(ours) ^ set(theirs)):
        odd = unpaired[0]
        where = folder if odd in ours else config.source
        raise ValueError(
            f"concat={folder}: {where} has no usable picture {odd}; names must be the same in both folders"
        )
    if ours != theirs or len(set(ours)) < len(ours):  # as a.png and a.jpg
        raise ValueError(f"concat={folder}: pairs need names of one order without their suffixes, and each name once")
    if data.buckets is not None and [*map(list, data.buckets)] != [*map(list, paired.buckets or ())]:
        raise ValueError(f"concat={folder}: with aspect_buckets both pictures of a pair need the same aspect")
    return paired
