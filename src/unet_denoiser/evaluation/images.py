"""Images of a dataset by index."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.data.transforms import UnreadableItemError

BATCH_SIZE = 64


def spread_indices(length: int, count: int) -> Tensor:
    """Return `count` evenly spaced indices of a sequence, or all of a shorter one."""
    return torch.linspace(0, length - 1, min(length, count)).long()


def stack_images(data: ImageDataset, indices: np.ndarray) -> Tensor:
    """Return the images at these indices, (N, C, *spatial)."""
    return torch.stack(_map(lambda index: data[index]["image"], data, indices))


def progress_bar(total: int, name: str, unit_scale: float = 1) -> Any:
    """Return a bar that counts images; work of less than two seconds shows none, and log files get a line seldom."""
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds
    shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} [{elapsed}<{remaining}, {rate_fmt}]"  # whole images
    options = {"unit": "img", "unit_scale": unit_scale, "bar_format": shape}
    return tqdm(total=total, desc=name, mininterval=interval, delay=2, **options)


def image_batches(data: ImageDataset, indices: np.ndarray, progress: str | None = None) -> Iterator[Tensor]:
    """Yield the images at these indices in batches (B, C, *spatial), with a progress bar of this name if it has one."""
    with nullcontext() if progress is None else progress_bar(len(indices), progress) as bar:
        for start in range(0, len(indices), BATCH_SIZE):
            part = indices[start : start + BATCH_SIZE]
            yield stack_images(data, part)
            if bar is not None:
                bar.update(len(part))


def read_images(data: ImageDataset, indices: np.ndarray) -> dict[int, Tensor]:
    """Return the images at these indices, by index, without those that cannot be decoded."""

    def read(index: int) -> Tensor | None:
        try:
            return data[index]["image"]
        except UnreadableItemError:
            return None

    images = zip(indices.tolist(), _map(read, data, indices), strict=True)
    return {index: image for index, image in images if image is not None}


def _map(read: Callable[[int], Any], data: ImageDataset, indices: np.ndarray) -> list[Any]:
    if not isinstance(data, EncodedImages):
        return [read(index) for index in indices.tolist()]
    with ThreadPoolExecutor() as pool:  # decoders release the GIL
        return list(pool.map(read, indices.tolist()))
