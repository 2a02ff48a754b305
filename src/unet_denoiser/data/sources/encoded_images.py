"""Encoded images, of files or tables, decoded when they are asked for."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.verification import Header, map_images, report_unusable
from unet_denoiser.data.transforms import Source, make_fill, parse_colour, read_pixels
from unet_denoiser.utils.images import MODES

MAX_DEFAULT_SIZE = 64  # pixels


class EncodedImages(ImageDataset):
    """Base class for folders and tables of images: channels, size, buckets and the cache in memory.

    A subclass defines `source`, and ends its constructor with `_set_up`.
    """

    config: DataConfig

    def source(self, index: int) -> Source:
        """Return the path or the content of an item's image file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of an item, for messages."""
        return str(self.source(index))

    def _set_up(self, config: DataConfig, headers: Sequence[Header]) -> None:
        self.config, self.headers = config, headers
        self.channels = config.channels or (1 if all(header.is_grey for header in headers) else 3)
        self.image_size = choose_size(config, headers)
        self.background = make_fill(config.background, self.channels)
        self._bucket: np.ndarray | None = None  # (N,) number of each item's bucket
        if config.aspect_buckets:
            self.bucket_sizes, self._bucket = assign_buckets(headers, self.image_size)
            self.buckets = [np.flatnonzero(self._bucket == i) for i in range(len(self.bucket_sizes))]
        self.in_memory = config.cache_images
        self._cached = self._decode_all(len(headers)) if config.cache_images else None

    def item_size(self, index: int) -> tuple[int, ...]:
        return self.image_size if self._bucket is None else self.bucket_sizes[self._bucket[index]]

    def pixels(self, index: int) -> Tensor:
        return self._decode(index) if self._cached is None else self._cached[index]

    def _decode(self, index: int) -> Tensor:
        return read_pixels(self.source(index), self.name(index), self.channels, self.item_size(index), self.config)

    def _decode_all(self, count: int) -> list[Tensor]:
        """Decode all items into one block of memory per dtype: where workers share it, one file handle each."""
        decoded: list[Tensor] = map_images(self._decode, range(count), "caching images")
        for dtype in {pixels.dtype for pixels in decoded}:
            indices = [i for i in range(count) if decoded[i].dtype == dtype]
            lengths = [decoded[i].numel() for i in indices]
            block = torch.empty(sum(lengths), dtype=dtype)
            for i, part in zip(indices, block.split(lengths), strict=True):
                decoded[i] = part.view_as(decoded[i]).copy_(decoded[i])
        return decoded


def check_config(config: DataConfig) -> None:
    """Raise ValueError for options that image files cannot have."""
    parse_colour(config.background)
    if config.channels is not None and config.channels not in MODES:
        raise ValueError(f"channels={config.channels}: image files have 1, 3 or 4; use an .npy or .npz for others")
    if config.image_size is not None:
        per_axis(config.image_size, 2)


def split_usable(headers: dict[str, Header], config: DataConfig, where: str) -> tuple[dict[str, Header], DataConfig]:
    """Return the headers of images that can be decoded and are large enough, and the configuration with their size.

    Raises:
        ValueError: there are others and `config.on_bad` is "raise"; for "skip" it warns.
    """
    problems = {key: header.problem for key, header in headers.items() if header.problem}
    if decodable := {key: header for key, header in headers.items() if not header.problem}:
        height, width = choose_size(config, list(decodable.values()))
        config = replace(config, image_size=(height, width))
        problems |= {
            key: f"is {header.height}x{header.width}, less than half of image_size {height}x{width}"
            for key, header in decodable.items()
            if 2 * header.height < height or 2 * header.width < width  # it would be enlarged more than twice
        }
    report_unusable(problems, len(headers), where, config.on_bad)
    return {key: header for key, header in headers.items() if key not in problems}, config


def choose_size(config: DataConfig, headers: Sequence[Header]) -> tuple[int, int]:
    """Return the configured size, else that of at least half of the images if it is small, else a square.

    The square has the largest side of 64, 32, 16 and 8 that at most doubles half of the images.
    """
    if config.image_size is not None:
        height, width = per_axis(config.image_size, 2)
        return height, width
    (size, count), *_ = Counter((header.height, header.width) for header in headers).most_common(1)
    if 2 * count >= len(headers) and max(size) <= MAX_DEFAULT_SIZE:
        return size
    median = sorted(min(header.height, header.width) for header in headers)[len(headers) // 2]
    side = next((s for s in (MAX_DEFAULT_SIZE, 32, 16) if 2 * median >= s), 8)
    return side, side


def assign_buckets(headers: Sequence[Header], size: tuple[int, int]) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Assign each image to the bucket of nearest aspect ratio, from 1:2 to 2:1, with about as many pixels as `size`.

    Returns:
        The (height, width) of each bucket that has images, and (N,) the number of each image's bucket.
    """
    area = size[0] * size[1]
    side = area**0.5
    step = max(8, int(side / 8) // 8 * 8)  # of the sides: multiples of 8 suit three downsamplings
    widths = range(step, int(2 * side) + 1, step)
    by_width = {(max(step, round(area / width / step) * step), width) for width in widths}
    sizes = sorted(by_width | {(width, height) for height, width in by_width})
    sizes = [s for s in sizes if 0.5 <= s[0] / s[1] <= 2] or [(max(step, round(side / step) * step),) * 2]
    # log, so that 1:2 and 2:1 are equally far from 1:1
    log_aspects = np.log([height / width for height, width in sizes])
    log_found = np.log([header.height / header.width for header in headers])
    nearest = np.abs(log_found[:, None] - log_aspects).argmin(1)  # (N, sizes) -> (N,)
    used, bucket = np.unique(nearest, return_inverse=True)
    return [sizes[i] for i in used], bucket
