"""Arrays of images, in memory or mapped from a file: .npz, .npy, and scikit-learn's digits."""

import math
import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DataConfig, ResizeMode
from unet_denoiser.data.columns import (
    encode_labels,
    encode_vectors,
    read_caption,
    refuse_absent,
    warn_empty_classes,
)
from unet_denoiser.data.dataset import ImageDataset, refuse_options
from unet_denoiser.data.transforms import compute_scaled_size, make_fill, to_float
from unet_denoiser.utils.cache import MappedArray

DIGITS = ("digits", "digits:held-out")
ORIGINS = {"class_labels": "labels", "caption": "captions", "vector": "vectors"}  # arrays of an .npz
MAX_CHECKED_IMAGES = 256  # of a mapped file, whose range is checked before training
MAX_UNCHECKED_SIZE = 2**30  # bytes of an array, above which
MAX_EXPANSION = 100  # times its compressed size is a bomb: no images compress so well
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class MappedImages(MappedArray):
    """The images of an .npy file, read from disk where they are used."""

    @cached_property
    def array(self) -> np.ndarray:
        """Return (N, C, *spatial), read-only; ValueError if the file is no readable .npy."""
        try:
            with self.path.open("rb") as file:
                _read_size(file, self.path.name, self.path.stat().st_size)
            array = super().array
        except Exception as error:  # of many types, for headers that claim anything
            raise ValueError(f"{self.path} is not a readable .npy file: {error}") from None
        return _move_channels_first(array, str(self.path))


class ArrayDataset(ImageDataset):
    """Images in memory, or mapped from a file.

    Args:
        images: (N, C, *spatial) uint8 or uint16 over their whole range, or floats in [-1, 1].
        labels: (N,) integers from 0, names or booleans, or None.
        class_names: one per class (default: the numbers).
        image_size: resize to this (bilinear, antialiased), one int or one per axis; for two spatial axes only.
        captions, vectors: N texts, and (N, D) numbers, or None.
        config: further options of the data: `resize_mode`, `horizontal_flip`, `background`.
        where: the name of the arrays, for messages.

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
        where: str = "the arrays",
    ) -> None:
        self.config = config
        self._set_images(images, image_size, where)
        count = len(self)
        if labels is not None:
            if np.shape(labels) != (count,):
                raise ValueError(f"labels of {where} have shape {np.shape(labels)}; give ({count},) integers from 0")
            self.labels, self.class_names = encode_labels(labels, class_names, where)
            if config is None:  # else `load_data` does so
                warn_empty_classes(self.labels, self.class_names, where)
        if captions is not None:
            if len(captions) != count:
                raise ValueError(f"{where}: there are {len(captions)} captions for {count} images")
            refuse_absent(captions, "caption", where, "item {}".format)
            self.captions = [read_caption(caption, where, f"item {i}") for i, caption in enumerate(captions)]
        if vectors is not None:
            if vectors.ndim != 2 or len(vectors) != count:
                raise ValueError(f"vectors of {where} have shape {vectors.shape}; give ({count}, D) numbers")
            self.vectors = encode_vectors({str(i): column for i, column in enumerate(vectors.T)}, where)
            self.vector_dim = vectors.shape[1]

    def _set_images(
        self, images: np.ndarray | MappedImages, image_size: int | Sequence[int] | None, where: str
    ) -> None:
        self.in_memory = isinstance(images, np.ndarray)
        array = images if isinstance(images, np.ndarray) else images.array
        if self.config is None and array.ndim == 4 and array.shape[3] in (1, 3, 4) and min(array.shape[1:3]) > 4:
            found = f"images of {where} have shape {array.shape}, as (N, H, W, C) has"
            warnings.warn(f"{found}, and are read as (N, C, H, W); np.moveaxis(images, -1, 1)", stacklevel=3)
        _check_images(array, self.in_memory, where)
        self.images = torch.from_numpy(_to_native(images)) if isinstance(images, np.ndarray) else images
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
        image = torch.from_numpy(_to_native(self.images.array[int(index)].copy()))  # the file is mapped read-only
        if image.is_floating_point() and not bool((image.abs() <= 1).all()):
            raise ValueError(f"image {int(index)} of {self.images.path} is not within [-1, 1]")
        return image if tuple(image.shape[1:]) == self._scaled_size else _resize(image[None], self._scaled_size)[0]


def load_npz(path: Path, config: DataConfig) -> ArrayDataset:
    """Load an .npz file with the array `images`, and optionally `labels`, `class_names`, `captions` and `vectors`.

    Other arrays are not read, and named in a warning.
    """
    arrays = _read_npz(path, ("images", "labels", "class_names", "captions", "vectors"))
    images = _move_channels_first(arrays["images"], f"'images' in {path}")
    names: Sequence[str] | None = config.class_names
    if "class_names" in arrays and not names:
        names = [str(name) for name in np.atleast_1d(arrays["class_names"])]
    options: Any = {name: arrays.get(name) for name in ("captions", "vectors")} | {"where": str(path)}
    data = ArrayDataset(images, arrays.get("labels"), names, config.image_size, config=config, **options)
    data.origins = {name: f"array {array}" for name, array in ORIGINS.items() if array in arrays}
    return _check_options(data, config)


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that the file has; ValueError if it cannot be read or lacks the first."""
    try:
        with ZipFile(path) as file:
            members = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
            wanted = [name for name in names if name in members]
            if names[0] in wanted:
                if unused := ", ".join(name for name in members if name not in names):
                    warnings.warn(f"{path}: not used: {unused}; arrays that are: {', '.join(names)}", stacklevel=4)
                return {name: _read_member(file, members[name]) for name in wanted}
    except Exception as error:  # of many types: damaged, encrypted, or compressed in an unknown way
        raise ValueError(f"{path} is not a readable .npz file: {error}") from None
    raise ValueError(f"{path} has no array {names[0]!r}; it has {', '.join(members) or 'none'}")


def _read_size(file: IO[bytes], name: str, available: int) -> int:
    """Return the bytes that an array has by its header; ValueError if more than there are."""
    version = np.lib.format.read_magic(file)
    if version not in HEADER_READERS:
        raise ValueError(f"{name} has the unknown version {version}")
    shape, _, dtype = HEADER_READERS[version](file)
    size = math.prod(shape) * dtype.itemsize  # of Python's integers, which do not overflow
    if size > available or min(shape, default=0) < 0:
        raise ValueError(f"the header of {name} claims the shape {shape} of {dtype}, but it has {available:,} bytes")
    return size


def _read_member(file: ZipFile, info: ZipInfo) -> np.ndarray:
    """Read an array of an .npz; ValueError if its header claims more than the file or the memory holds."""
    with file.open(info) as member:
        size = _read_size(member, info.filename, info.file_size)
    if hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ValueError(f"{info.filename} has {size / 2**30:,.0f} GiB, more than the memory; an .npy stays on disk")
    if size > max(MAX_UNCHECKED_SIZE, MAX_EXPANSION * info.compress_size):
        found = f"{info.filename} expands from {info.compress_size / 2**20:,.0f} MiB to {size / 2**20:,.0f} MiB"
        raise ValueError(f"{found}, which no images do; if it is right, save it by np.savez, uncompressed")
    with file.open(info) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return array


def load_npy(path: Path, config: DataConfig) -> ArrayDataset:
    """Load the images of an .npy file, which stay on disk until they are used."""
    images = MappedImages(path)
    return _check_options(ArrayDataset(images, image_size=config.image_size, config=config, where=str(path)), config)


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
    data = ArrayDataset(images, labels, config.class_names, config.image_size, config=config, where=config.source)
    data.origins = {"class_labels": "the digits"}
    return _check_options(data, config)


def _check_options(data: ArrayDataset, config: DataConfig) -> ArrayDataset:
    """Return the data; ValueError for options that have no effect on arrays."""
    if config.channels is not None and config.channels != data.channels:
        raise ValueError(f"channels={config.channels}, but the arrays have {data.channels}; leave it out")
    unused = ("split", "image_column", "label_column", "caption_column", "vector_columns")
    refuse_options(config, (*unused, "aspect_buckets", "streaming", "cache_images"), "arrays")
    return data


def _move_channels_first(images: np.ndarray, where: str) -> np.ndarray:
    """Return (N, H, W) as (N, 1, H, W), and (N, H, W, C) as (N, C, H, W); ValueError for the shape of (N, C, H, W)."""
    shape = images.shape
    if images.ndim not in (3, 4):
        raise ValueError(f"{where} has shape {shape}; give (N, H, W) or (N, H, W, C)")
    if images.ndim == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) > 4:
        raise ValueError(
            f"{where} has shape {shape}, as (N, C, H, W) has; give (N, H, W, C): np.moveaxis(images, 1, -1)"
        )
    if images.ndim == 3 and (shape[1] in (1, 3, 4) or shape[2] in (3, 4)) and max(shape[1:]) > 4:
        found = f"{where} has shape {shape}, which is read as {shape[0]} grey images of {shape[1]}x{shape[2]} pixels"
        warnings.warn(f"{found}; give images as (N, H, W, C)", stacklevel=4)
    return images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)


def _to_native(images: np.ndarray) -> np.ndarray:
    """Return an array that torch can hold: contiguous, in the machine's order of bytes, floats of at most 64 bits."""
    is_long = images.dtype.kind == "f" and images.dtype.itemsize > 8
    return np.ascontiguousarray(images, np.float64 if is_long else images.dtype.newbyteorder("="))


def _check_images(images: np.ndarray, in_memory: bool, where: str) -> None:
    """Raise for images of another shape, type or range, and warn of a range that is used in part only."""
    if images.ndim < 3 or not images.size:
        raise ValueError(f"images of {where} have shape {images.shape}; give (N, C, *spatial) with N of at least 1")
    kind = images.dtype.newbyteorder("=")
    if kind.kind not in "biuf":
        raise TypeError(f"images of {where} have dtype {kind}; give uint8, uint16, or floats in [-1, 1]")
    # of a file only a part, spread evenly, since reading all may take minutes; `pixels` checks each image again
    checked = images if in_memory else images[:: -(-len(images) // MAX_CHECKED_IMAGES)]
    low, high = checked.min(), checked.max()
    span = f"images of {where} go from {low:g} to {high:g}"
    if kind.kind == "f":
        if not (low >= -1 and high <= 1):  # in this form it is True for NaN too
            remedy = "; give uint8, or images / 127.5 - 1" if low >= 0 and 1 < high <= 255 else ""
            raise ValueError(f"{span}; floats must be in [-1, 1]{remedy}")
        if 0 <= low < high:
            warnings.warn(f"{span}, and black is -1; if 0 is black, give images * 2 - 1", stacklevel=5)
    elif kind not in (np.uint8, np.uint16):
        remedy = "images.astype(np.uint8)" if high > 1 else "images.astype(np.uint8) * 255"
        example = f"; for example {remedy}" if low >= 0 and high <= 255 else ""
        raise TypeError(f"images of {where} have dtype {kind}; give uint8, uint16, or floats in [-1, 1]{example}")
    elif low < high < np.iinfo(kind).max / 8:
        remedy = "images * 255" if high == 1 else "scale them to the whole range"
        warnings.warn(f"{span} of 0 to {np.iinfo(kind).max}, so they are nearly black; {remedy}", stacklevel=5)


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resize (N, C, H, W) uint8, uint16 or floats in [-1, 1]; uint8 stays uint8, others become floats in [-1, 1]."""
    if images.dtype == torch.uint8:
        resized = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        return resized.round().clamp(0, 255).to(torch.uint8)
    return F.interpolate(to_float(images), size=size, mode="bilinear", antialias=True).clamp(-1, 1)
