"""Data sets as tensors: the digits, folders of images, .npz arrays.

Each is a map-style data set of {"image": float32 (C, *spatial) in [-1, 1], "class_labels": int64} and knows its
channels, size and class names, from which the network's are set.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from unet_denoiser.images import MODES

LARGEST_DEFAULT_SIZE = 64


class ImageData(Dataset[dict[str, Any]]):
    """A data set that knows what a network for it needs to know.

    channels: C. image_size: one int per spatial axis. class_names: in label order, or None without labels.
    """

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None

    def __len__(self) -> int:
        raise NotImplementedError


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
        if image_size is not None and (size := _per_axis(image_size, images.ndim - 2)) != images.shape[2:]:
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
        item: dict[str, Any] = {"image": _to_float(self.images[index])}
        return item if self.labels is None else item | {"class_labels": self.labels[index]}


class FolderData(ImageData):
    """Images below a folder, sub-folders as classes, decoded when they are asked for.

    Every image is converted to `channels`, scaled to cover `image_size` and cut to it at the centre.

    Args:
        folder: any formats that Pillow reads, at any depth; the folder each file lies in is its class.
        image_size: default: the size that at least half of the images have if that is at most 64, else 64.
        channels: 1, 3 or 4 (default: 1 if all images are grey, else 3). Alpha is laid on white unless channels is 4.

    Raises:
        FileNotFoundError, ValueError: no folder, no images, or a file that is not an image, by its path.
    """

    def __init__(
        self, folder: Path, image_size: int | Sequence[int] | None = None, channels: int | None = None
    ) -> None:
        if channels is not None and channels not in MODES:
            raise ValueError(f"in_channels={channels}: images in a folder have 1, 3 or 4; use an .npz for others")
        self.files, self.labels, self.class_names = _list_folder(folder)
        headers = [_read_header(file) for file in self.files]
        grey = all(mode in ("1", "L", "I;16", "I", "F") for mode, _ in headers)
        self.channels = channels or (1 if grey else 3)
        sizes = Counter(size for _, size in headers)
        (size, count), *_ = sizes.most_common(1)
        native = 2 * count >= len(headers) and max(size) <= LARGEST_DEFAULT_SIZE
        default = size if native else (LARGEST_DEFAULT_SIZE, LARGEST_DEFAULT_SIZE)
        self.image_size = default if image_size is None else _per_axis(image_size, 2)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with Image.open(self.files[index]) as image:
                height, width = self.image_size
                fitted = ImageOps.fit(_to_mode(image, MODES[self.channels]), (width, height), Image.Resampling.BICUBIC)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.files[index]} cannot be read as an image: {error}") from None
        pixels = torch.from_numpy(np.array(fitted))
        item: dict[str, Any] = {"image": _to_float(pixels.view(*self.image_size, self.channels).permute(2, 0, 1))}
        return item if self.labels is None else item | {"class_labels": self.labels[index]}


def load_data(
    source: str | Path, image_size: int | Sequence[int] | None = None, channels: int | None = None
) -> ImageData:
    """The data set that a command line names.

    Args:
        source: "digits" (see `digits`), a folder of images, or an .npz with `images` (N, H, W[, C]), uint8 or floats
            in [-1, 1], and optionally `labels` (N,) and `class_names`.
        image_size: resize to this, one int or one per axis (height, width).
        channels: convert the images of a folder to 1, 3 or 4 channels.

    Raises:
        FileNotFoundError, ValueError, TypeError: what is wrong with it, in one line.
    """
    if str(source) == "digits":
        images, labels = digits()
        return ArrayData(images, labels, image_size=image_size)
    path = Path(source)
    if path.is_dir() and str(source):
        return FolderData(path, image_size, channels)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path, image_size)
    raise FileNotFoundError(f"DATA={source!s} is not 'digits', nor an existing folder of images or .npz file")


def digits(held_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: images (N, 1, 8, 8) in [-1, 1] and labels (N,).

    Every fifth is held out from training, so that samples can be compared with digits the network never saw: 1,438
    to train on, 359 held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 4) == held_out
    return (data.images[chosen, None] / 8 - 1).astype(np.float32), data.target[chosen]


class EndlessSampler(Sampler[int]):
    """Indices of a data set in a new random order each epoch, from position `start` to `stop` of an endless stream.

    Epochs follow each other without a gap, so any batch size fits any data set, and training goes on at any position
    with the indices it would have had. The order depends on `seed` and the epoch's number alone.
    """

    def __init__(self, size: int, seed: int, start: int, stop: int) -> None:
        self.size, self.seed, self.start, self.stop = size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while position < self.stop:
            epoch, offset = divmod(position, self.size)
            order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            order = order[offset : offset + self.stop - position].tolist()
            yield from order
            position += len(order)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _load_npz(path: Path, image_size: int | Sequence[int] | None) -> ArrayData:
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


def _list_folder(folder: Path) -> tuple[list[str], Tensor | None, list[str] | None]:
    """Files, labels and class names, as Hugging Face `datasets` finds them in a folder of images."""
    import datasets

    datasets.utils.disable_progress_bars()
    try:
        # the pattern keeps folders called train or test from being taken for splits
        found = datasets.load_dataset(
            "imagefolder", data_files={"train": f"{glob.escape(str(folder))}/**"}, split="train"
        )
    except (
        datasets.exceptions.DatasetGenerationError,
        datasets.exceptions.DataFilesNotFoundError,
        ValueError,
    ) as error:
        raise ValueError(f"no images were found in {folder}: {str(error).splitlines()[0]}") from None
    found = found.cast_column("image", datasets.Image(decode=False))
    files = [row["path"] for row in found["image"]]
    label = found.features.get("label")
    if not files:
        raise ValueError(f"no images were found in {folder}")
    return (
        files,
        None if label is None else torch.tensor(found["label"][:]),
        None if label is None else list(label.names),
    )


def _read_header(file: str) -> tuple[str, tuple[int, int]]:
    """(mode, (height, width)) from an image's header, without decoding it."""
    try:
        with Image.open(file) as image:
            return image.mode, (image.height, image.width)
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from None


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image, np.float32) / 257).round().astype(np.uint8))
    if mode != "RGBA" and ("A" in image.getbands() or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if len(size) != 2:
        raise ValueError(f"image_size={size} cannot resize data with {len(size)} axes; leave it out")
    resized = torch.cat(
        [F.interpolate(batch.float(), size=size, mode="bilinear", antialias=True) for batch in images.split(256)]
    )
    return resized.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else resized.clamp(-1, 1)


def _per_axis(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"image_size={size} must be a positive int, or {axes} of them")
    return sizes


def _check_labels(labels: np.ndarray, count: int) -> Tensor:
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"labels have shape {labels.shape} and dtype {labels.dtype}; give ({count},) integers from 0")
    return torch.from_numpy(labels.astype(np.int64))
