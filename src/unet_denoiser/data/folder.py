"""Images below a folder."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from unet_denoiser.data.base import ImageData, per_axis, to_float
from unet_denoiser.images import MODES

LARGEST_DEFAULT_SIZE = 64


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
        self.image_size = default if image_size is None else per_axis(image_size, 2)

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
        item: dict[str, Any] = {"image": to_float(pixels.view(*self.image_size, self.channels).permute(2, 0, 1))}
        return item if self.labels is None else item | {"class_labels": self.labels[index]}


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
