"""Arrays of images, in memory or mapped from a file: .npz, .npy, and scikit-learn's digits."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig, ResizeMode
from unet_denoiser.data.columns import encode_labels, encode_vectors
from unet_denoiser.data.dataset import ImageDataset, refuse_options
from unet_denoiser.data.transforms import fill_colour, scaled_size, to_float

DIGITS = ("digits", "digits:held-out")
CHECKED = 256  # images of a mapped file whose range is looked at before training


class Mapped:
    """The array of an .npy file, read from the disk where it is used; with channels first.

    It is opened again in each process, so that no worker gets a copy.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        try:
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} is not a readable .npy file: {error}") from None
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{self.path} is an .npz by its content; give it that name")
        self.array = _channels_first(array, str(self.path))
        self.shape, self.dtype, self.ndim, self.size = self.array.shape, array.dtype, self.array.ndim, array.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.array[int(index)]))

    def __len__(self) -> int:
        return len(self.array)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open()


class ArrayDataset(ImageDataset):
    """Images in memory, or mapped from a file.

    Args:
        images: (N, C, *spatial): uint8 or uint16 over their whole range, or floats in [-1, 1].
        labels: (N,) integers from 0, or None.
        class_names: one per class (default: the numbers).
        image_size: resize to this (bilinear, antialiased), one int or one per axis; images of two axes only.
        captions: (N,) texts, or None.
        vectors: (N, D) numbers, or None.
        config: further options of the data: `resize_mode`, `horizontal_flip`, `background`.

    Raises:
        ValueError, TypeError: arrays of another shape, dtype or range.
    """

    def __init__(
        self,
        images: np.ndarray | Mapped,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] | None = None,
        image_size: int | Sequence[int] | None = None,
        captions: Sequence[str] | None = None,
        vectors: np.ndarray | None = None,
        config: DataConfig | None = None,
    ) -> None:
        _check_images(images)
        self.images = images if isinstance(images, Mapped) else torch.from_numpy(np.ascontiguousarray(images))
        self.in_memory = not isinstance(images, Mapped)
        self.config, self.channels = config, images.shape[1]
        self.image_size = tuple(images.shape[2:])
        if image_size is not None:
            self.image_size = per_axis(image_size, images.ndim - 2)
        self._scaled = self.image_size
        if self.image_size != images.shape[2:]:
            if images.ndim != 4:
                raise ValueError(
                    f"image_size={image_size} cannot resize data with {images.ndim - 2} axes; leave it out"
                )
            mode: ResizeMode = "center_crop" if config is None else config.resize_mode
            self._scaled = scaled_size(images.shape[2:], self.image_size, mode)
            if isinstance(self.images, Tensor):
                self.images = torch.cat([_resize(batch, self._scaled) for batch in self.images.split(256)])
        self.background = fill_colour("white" if config is None else config.background, self.channels)
        self._add_conditions(labels, class_names, captions, vectors)

    def _add_conditions(
        self,
        labels: np.ndarray | None,
        class_names: Sequence[str] | None,
        captions: Sequence[str] | None,
        vectors: np.ndarray | None,
    ) -> None:
        count = len(self.images)
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

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int) -> Tensor:
        image = self.images[int(index)]
        if isinstance(self.images, Mapped):
            if image.is_floating_point() and not bool((image.abs() <= 1).all()):
                raise ValueError(f"image {int(index)} of {self.images.path} is not within [-1, 1]")
            if tuple(image.shape[1:]) != self._scaled:
                image = _resize(image[None], self._scaled)[0]
        return image


def load_npz(path: Path, config: DataConfig) -> ArrayDataset:
    """The arrays `images`, and if there are any `labels`, `class_names`, `captions` and `vectors`, of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array 'images'; it has {', '.join(arrays) or 'none'}")
    images = _channels_first(arrays["images"], f"'images' in {path}")
    found = arrays.get("class_names")
    names = config.class_names if found is None or config.class_names else [str(name) for name in found]
    captions, vectors = arrays.get("captions"), arrays.get("vectors")
    return _checked(ArrayDataset(images, arrays.get("labels"), names, config.image_size, captions, vectors, config))


def load_npy(path: Path, config: DataConfig) -> ArrayDataset:
    """The images of an .npy file, which stay on the disk until they are used."""
    return _checked(ArrayDataset(Mapped(path), image_size=config.image_size, config=config))


def digits(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: images (N, 1, 8, 8) in [-1, 1] and labels (N,).

    Every fifth is held out from training, so that samples can be compared with digits the network never saw: 1,438
    to train on, 359 held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == held_out
    return (data.images[chosen, None] / 8 - 1).astype(np.float32), data.target[chosen]


def load_digits_data(config: DataConfig) -> ArrayDataset:
    images, labels = digits(held_out=config.source == "digits:held-out")
    return _checked(ArrayDataset(images, labels, config.class_names, config.image_size, config=config))


def _checked(data: ArrayDataset) -> ArrayDataset:
    """The data, unless the configuration has an option that arrays cannot have."""
    config = data.config or DataConfig("arrays")
    if config.channels is not None and config.channels != data.channels:
        raise ValueError(f"channels={config.channels}, but the arrays have {data.channels}; leave it out")
    unused = ("split", "image_column", "label_column", "caption_column", "vector_columns")
    refuse_options(config, (*unused, "aspect_buckets", "streaming", "cache_images"), "arrays")
    return data


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    if images.ndim not in (3, 4):
        raise ValueError(f"{where} has shape {images.shape}; give (N, H, W) or (N, H, W, C)")
    return images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)


def _check_images(images: np.ndarray | Mapped) -> None:
    if images.ndim < 3 or not images.size:
        raise ValueError(f"images have shape {images.shape}; give (N, C, *spatial) with N of at least 1")
    if images.dtype in (np.uint8, np.uint16):
        return
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"images have dtype {images.dtype}; give uint8, uint16, or floats in [-1, 1]")
    array = images.array[:: -(-len(images) // CHECKED)] if isinstance(images, Mapped) else images
    if not (array.min() >= -1 and array.max() <= 1):
        raise ValueError(f"images go from {array.min():g} to {array.max():g}; floats must be in [-1, 1]")


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, C, H, W) uint8, uint16 or floats in [-1, 1] -> `size`; uint8 stay uint8."""
    if images.dtype == torch.uint8:
        resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(to_float(images), size=size, mode="bilinear", antialias=True).clamp(-1, 1)
