"""Arrays in memory: .npz files and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.data.base import ImageData, per_axis, to_float


class ArrayData(ImageData):
    """Images in memory.

    Args:
        images: (N, C, *spatial): uint8, or floats in [-1, 1].
        labels: (N,) integers from 0, or None.
        class_names: one per class (default: the numbers).
        image_size: resize to this (bilinear, antialiased), one int or one per axis.

    Raises:
        ValueError, TypeError: arrays of another shape, dtype or range.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        if images.ndim < 3 or not images.size:
            raise ValueError(f"images have shape {images.shape}; give (N, C, *spatial) with N of at least 1")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise TypeError(f"images have dtype {images.dtype}; give uint8, or floats in [-1, 1]")
        if images.dtype != np.uint8 and not (images.min() >= -1 and images.max() <= 1):
            raise ValueError(f"images go from {images.min():g} to {images.max():g}; floats must be in [-1, 1]")
        self.images = torch.from_numpy(np.ascontiguousarray(images))
        if image_size is not None and (size := per_axis(image_size, images.ndim - 2)) != images.shape[2:]:
            self.images = _resize(self.images, size)
        self.channels, self.image_size = self.images.shape[1], tuple(self.images.shape[2:])
        self.labels = None if labels is None else _check_labels(labels, len(images))
        self.class_names = None
        if self.labels is not None:
            numbers = [str(i) for i in range(int(self.labels.max()) + 1)]
            self.class_names = list(class_names) if class_names is not None else numbers
            if len(self.class_names) < len(numbers):
                raise ValueError(f"class_names has {len(self.class_names)} entries, labels go up to {len(numbers) - 1}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"image": to_float(self.images[index])}
        return item if self.labels is None else item | {"class_labels": self.labels[index]}


def digits(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: images (N, 1, 8, 8) in [-1, 1] and labels (N,).

    Every fifth is held out from training, so that samples can be compared with digits the network never saw: 1,438
    to train on, 359 held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == held_out
    return (data.images[chosen, None] / 8 - 1).astype(np.float32), data.target[chosen]


def load_npz(path: Path, image_size: int | Sequence[int] | None) -> ArrayData:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array 'images'; it has {', '.join(arrays) or 'none'}")
    images = arrays["images"]
    if images.ndim not in (3, 4):
        raise ValueError(f"'images' in {path} has shape {images.shape}; give (N, H, W) or (N, H, W, C)")
    images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    names = arrays.get("class_names")
    return ArrayData(images, arrays.get("labels"), None if names is None else [str(n) for n in names], image_size)


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if len(size) != 2:
        raise ValueError(f"image_size={size} cannot resize data with {len(size)} axes; leave it out")
    resized = torch.cat(
        [F.interpolate(batch.float(), size=size, mode="bilinear", antialias=True) for batch in images.split(256)]
    )
    return resized.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else resized.clamp(-1, 1)


def _check_labels(labels: np.ndarray, count: int) -> Tensor:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels have shape {labels.shape} and dtype {labels.dtype}; give ({count},) integers from 0")
    return torch.from_numpy(labels.astype(np.int64))
