"""Arrays of images, in memory or mapped from a file: .npz, .npy, and scikit-learn's digits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig, ResizeMode
from unet_denoiser.data.columns import encode_labels, encode_vectors
from unet_denoiser.data.dataset import ImageDataset, refuse_options
from unet_denoiser.data.transforms import compute_scaled_size, make_fill, to_float
from unet_denoiser.utils.cache import MappedArray

DIGITS = ("digits", "digits:held-out")
MAX_CHECKED_IMAGES = 256  # of a mapped file, whose range is checked before training


class MappedImages(MappedArray):
    """The images of an .npy file, read from disk where they are used."""

    @cached_property
    def array(self) -> np.ndarray:
        """Return (N, C, *spatial), read-only; ValueError if the file is no readable .npy."""
        try:
            array = super().array
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} is not a readable .npy file: {error}") from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self.path} is an .npz by its content; give it that name")
        return _move_channels_first(array, str(self.path))


class ArrayDataset(ImageDataset):
    """Images in memory, or mapped from a file.

    Args:
        images: (N, C, *spatial) uint8 or uint16 over their whole range, or floats in [-1, 1].
        labels: (N,) integers from 0, or None.
        class_names: one per class (default: the numbers).
        image_size: resize to this (bilinear, antialiased), one int or one per axis; for two spatial axes only.
        captions, vectors: N texts, and (N, D) numbers, or None.
        config: further options of the data: `resize_mode`, `horizontal_flip`, `background`.

    Raises:
        ValueError, TypeError: arrays of another shape, dtype or range.
    """

    def __init__(
        self,
        images: np.ndarray | MappedImages,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | Sequence[int] | None = None,
        *,
        captions: Sequence[str] | None = None,
        vectors: np.ndarray | None = None,
        config: DataConfig | None = None,
    ) -> None:
        self.config = config
        self._set_images(images, image_size)
        count = len(self)
        if labels is not None:
            if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
                found = f"shape {labels.shape} and dtype {labels.dtype}"
                raise ValueError(f"labels have {found}; give ({count},) integers from 0")
            self.labels, self.class_names = encode_labels(labels, class_names, "the arrays")
        if captions is not None:
            if len(captions) != count:
                raise ValueError(f"there are {len(captions)} captions for {count} images")
            self.captions = [str(caption) for caption in captions]
        if vectors is not None:
            if vectors.ndim != 2 or len(vectors) != count:
                raise ValueError(f"vectors have shape {vectors.shape}; give ({count}, D) numbers")
            self.vectors = encode_vectors({str(i): column for i, column in enumerate(vectors.T)}, "the arrays")
            self.vector_dim = vectors.shape[1]

    def _set_images(self, images: np.ndarray | MappedImages, image_size: int | Sequence[int] | None) -> None:
        self.in_memory = isinstance(images, np.ndarray)
        array = images if isinstance(images, np.ndarray) else images.array
        _check_images(array, self.in_memory)
        self.images = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
        self.channels, axes = array.shape[1], array.ndim - 2
        self.image_size = array.shape[2:] if image_size is None else per_axis(image_size, axes)
        self._scaled_size = self.image_size  # before cropping or padding
        if self.image_size != array.shape[2:]:
            if axes != 2:
                raise ValueError(f"image_size={image_size} cannot resize data with {axes} axes; leave it out")
            mode: ResizeMode = "center_crop" if self.config is None else self.config.resize_mode
            self._scaled_size = compute_scaled_size(array.shape[2:], self.image_size, mode)
            if isinstance(self.images, Tensor):  # in batches, since the floats in between take four times the memory
                self.images = torch.cat([_resize(batch, self._scaled_size) for batch in self.images.split(256)])
        self.background = make_fill("white" if self.config is None else self.config.background, self.channels)

    def __len__(self) -> int:
        return len(self.images if isinstance(self.images, Tensor) else self.images.array)

    def pixels(self, index: int) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[int(index)]
        image = torch.from_numpy(np.array(self.images.array[int(index)]))  # copied, since the file is mapped read-only
        if image.is_floating_point() and not bool((image.abs() <= 1).all()):
            raise ValueError(f"image {int(index)} of {self.images.path} is not within [-1, 1]")
        return image if tuple(image.shape[1:]) == self._scaled_size else _resize(image[None], self._scaled_size)[0]


def load_npz(path: Path, config: DataConfig) -> ArrayDataset:
    """Load an .npz file with the array `images`, and optionally `labels`, `class_names`, `captions` and `vectors`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array 'images'; it has {', '.join(arrays) or 'none'}")
    images = _move_channels_first(arrays["images"], f"'images' in {path}")
    names: Sequence[str] | None = config.class_names
    if "class_names" in arrays and not names:
        names = [str(name) for name in arrays["class_names"]]
    conditions = {name: arrays.get(name) for name in ("captions", "vectors")}
    data = ArrayDataset(images, arrays.get("labels"), names, config.image_size, config=config, **conditions)
    return _check_options(data, config)


def load_npy(path: Path, config: DataConfig) -> ArrayDataset:
    """Load the images of an .npy file, which stay on disk until they are used."""
    return _check_options(ArrayDataset(MappedImages(path), image_size=config.image_size, config=config), config)


def digits(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 1, 8, 8) in [-1, 1] and labels (N,) of scikit-learn's digits: 1,438 to train on, or the others.

    Every fifth, 359 in all, is held out from training, to compare samples with digits that the network has not seen.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    selected = (np.arange(len(data.target)) % 5 == 4) == held_out
    return (data.images[selected, None] / 8 - 1).astype(np.float32), data.target[selected]


def load_digits_data(config: DataConfig) -> ArrayDataset:
    """Load the digits that `config.source` names: "digits" to train on, or "digits:held-out"."""
    images, labels = digits(held_out=config.source == "digits:held-out")
    return _check_options(ArrayDataset(images, labels, config.class_names, config.image_size, config=config), config)


def _check_options(data: ArrayDataset, config: DataConfig) -> ArrayDataset:
    """Return the data; ValueError for options that have no effect on arrays."""
    if config.channels is not None and config.channels != data.channels:
        raise ValueError(f"channels={config.channels}, but the arrays have {data.channels}; leave it out")
    unused = ("split", "image_column", "label_column", "caption_column", "vector_columns")
    refuse_options(config, (*unused, "aspect_buckets", "streaming", "cache_images"), "arrays")
    return data


def _move_channels_first(images: np.ndarray, where: str) -> np.ndarray:
    """Return (N, H, W) as (N, 1, H, W), and (N, H, W, C) as (N, C, H, W)."""
    if images.ndim not in (3, 4):
        raise ValueError(f"{where} has shape {images.shape}; give (N, H, W) or (N, H, W, C)")
    return images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)


def _check_images(images: np.ndarray, in_memory: bool) -> None:
    if images.ndim < 3 or not images.size:
        raise ValueError(f"images have shape {images.shape}; give (N, C, *spatial) with N of at least 1")
    if images.dtype in (np.uint8, np.uint16):
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images have dtype {images.dtype}; give uint8, uint16, or floats in [-1, 1]")
    # of a file only a part, spread evenly, since reading all may take minutes; `pixels` checks each image again
    checked = images if in_memory else images[:: -(-len(images) // MAX_CHECKED_IMAGES)]
    if not (checked.min() >= -1 and checked.max() <= 1):  # in this form it is True for NaN too
        raise ValueError(f"images go from {checked.min():g} to {checked.max():g}; floats must be in [-1, 1]")


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize (N, C, H, W) uint8, uint16 or floats in [-1, 1]; uint8 stays uint8, others become floats in [-1, 1]."""
    if images.dtype == torch.uint8:
        resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(to_float(images), size=size, mode="bilinear", antialias=True).clamp(-1, 1)
