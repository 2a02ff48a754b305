"""Encoded images, of files or tables, decoded when they are asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.verification import PROGRESS_FROM, Header, report_unusable, too_small
from unet_denoiser.data.transforms import Source, check_colour, fill_colour, open_image, to_pixels
from unet_denoiser.utils.images import MODES

LARGEST_DEFAULT_SIZE = 64


class EncodedImages(ImageDataset):
    """What folders and tables of images share: channels, sizes, buckets and the cache in memory.

    A subclass gives `source`, the path or the content of an item. After all else it calls `_set_up`.
    """

    config: DataConfig

    def source(self, index: int) -> Source:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def _set_up(self, config: DataConfig, headers: Sequence[Header]) -> None:
        self.config = config
        self.channels = config.channels or (1 if all(header.grey for header in headers) else 3)
        self.image_size = choose_size(config, headers)
        self.background = fill_colour(config.background, self.channels)
        self._bucket: np.ndarray | None = None
        if config.aspect_buckets:
            self.bucket_sizes, self._bucket = assign_buckets(headers, self.image_size)
            self.buckets = [np.flatnonzero(self._bucket == i) for i in range(len(self.bucket_sizes))]
        self._cached: list[Tensor] | None = None
        self.in_memory = config.cache_images
        if config.cache_images:
            self._fill_cache(headers)

    def size_of(self, index: int) -> tuple[int, ...]:
        return self.image_size if self._bucket is None else self.bucket_sizes[self._bucket[index]]

    def pixels(self, index: int) -> Tensor:
        return self._decode(index) if self._cached is None else self._cached[index]

    def _decode(self, index: int) -> Tensor:
        image = open_image(self.source(index), self.name(index))
        return to_pixels(image, self.channels, self.size_of(index), self.config.resize_mode, self.config.background)

    def _fill_cache(self, headers: Sequence[Header]) -> None:
        """Decode everything into one block per type of pixel, which processes share: one handle, not one per image."""
        from tqdm import tqdm

        indices, hidden = range(len(headers)), True if len(headers) < PROGRESS_FROM else None
        with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:
            decoded = list(tqdm(pool.map(self._decode, indices), "caching images", len(headers), disable=hidden))
        views = list(decoded)
        for dtype in {pixels.dtype for pixels in decoded}:
            chosen = [i for i in indices if decoded[i].dtype == dtype]
            block = torch.empty(sum(decoded[i].numel() for i in chosen), dtype=dtype).share_memory_()
            for i, part in zip(chosen, block.split([decoded[i].numel() for i in chosen]), strict=True):
                views[i] = part.view_as(decoded[i]).copy_(decoded[i])
        self._cached = views


def check_config(config: DataConfig) -> None:
    """ValueError for options that no image files can have."""
    check_colour(config.background)
    if config.channels is not None and config.channels not in MODES:
        raise ValueError(f"channels={config.channels}: image files have 1, 3 or 4; use an .npy or .npz for others")
    if config.image_size is not None:
        per_axis(config.image_size, 2)


def split_usable(headers: dict[str, Header], config: DataConfig, where: str) -> tuple[dict[str, Header], DataConfig]:
    """The images that can be decoded and are large enough, and the configuration with the size that was chosen.

    Raises:
        ValueError: others, by name, for on_bad="raise"; a warning tells of them for "skip".
    """
    bad = {key: header.problem for key, header in headers.items() if header.problem}
    if good := [header for header in headers.values() if not header.problem]:
        size = choose_size(config, good)
        config = replace(config, image_size=size)
        small = {key: too_small(header, size) for key, header in headers.items() if key not in bad}
        bad |= {key: problem for key, problem in small.items() if problem}
    report_unusable(bad, len(headers), where, config.on_bad)
    return {key: header for key, header in headers.items() if key not in bad}, config


def choose_size(config: DataConfig, headers: Sequence[Header]) -> tuple[int, int]:
    """The configured size, else that of at least half of the images if it is small, else what half of them fill."""
    if config.image_size is not None:
        height, width = per_axis(config.image_size, 2)
        return height, width
    (size, count), *_ = Counter((header.height, header.width) for header in headers).most_common(1)
    if 2 * count >= len(headers) and max(size) <= LARGEST_DEFAULT_SIZE:
        return size
    short = sorted(min(header.height, header.width) for header in headers)[len(headers) // 2]
    side = next((s for s in (LARGEST_DEFAULT_SIZE, 32, 16) if 2 * short >= s), 8)
    return side, side


def assign_buckets(headers: Sequence[Header], size: tuple[int, int]) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Sizes of about as many pixels as `size`, from 1:2 to 2:1, that images are nearest to; and each image's own.

    Returns:
        The (height, width) that occur, and for each image the number of its bucket.
    """
    area = size[0] * size[1]
    side = area**0.5
    step = max(8, int(side / 8) // 8 * 8)
    widths = range(step, int(2 * side) + 1, step)
    wide = {(max(step, round(area / width / step) * step), width) for width in widths}
    sizes = sorted(wide | {(width, height) for height, width in wide})
    sizes = [s for s in sizes if 0.5 <= s[0] / s[1] <= 2] or [(max(step, round(side / step) * step),) * 2]
    aspects = np.log([height / width for height, width in sizes])
    wanted = np.log([header.height / header.width for header in headers])
    nearest = np.abs(wanted[:, None] - aspects).argmin(1)
    used, bucket = np.unique(nearest, return_inverse=True)
    return [sizes[i] for i in used], bucket
