"""What every data set here is: items for training, and what a network for them needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class ImageData(Dataset[dict[str, Any]]):
    """A data set that knows what a network for it needs to know.

    channels: C. image_size: one int per spatial axis. class_names: in label order, or None without labels.
    """

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None

    def __len__(self) -> int:
        raise NotImplementedError


def to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()


def per_axis(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"image_size={size} must be a positive int, or {axes} of them")
    return sizes
