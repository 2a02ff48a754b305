"""Data sets as tensors: the digits, folders of images, .npz arrays.

Each is a map-style data set of {"image": float32 (C, *spatial) in [-1, 1], "class_labels": int64} and knows its
channels, size and class names, from which the network's are set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unet_denoiser.data.arrays import ArrayData as ArrayData
from unet_denoiser.data.arrays import digits as digits
from unet_denoiser.data.arrays import load_npz
from unet_denoiser.data.base import ImageData as ImageData
from unet_denoiser.data.folder import FolderData as FolderData
from unet_denoiser.data.loader import EndlessBatches as EndlessBatches
from unet_denoiser.data.loader import make_loader as make_loader
from unet_denoiser.recipe import DataConfig


def load_data(config: DataConfig | str | Path, **options: Any) -> ImageData:
    """The data set that a configuration names.

    Args:
        config: a `DataConfig`, or its `source` alone.
        options: its other fields, to change or to give with a source.

    Raises:
        FileNotFoundError, ValueError, TypeError: what is wrong with it, in one line.
    """
    config = replace(config, **options) if isinstance(config, DataConfig) else DataConfig(str(config), **options)
    if config.source == "digits":
        images, labels = digits()
        return ArrayData(images, labels, image_size=config.image_size)
    path = Path(config.source)
    if path.is_dir():
        return FolderData(path, config.image_size, config.channels)
    if path.suffix == ".npz" and path.is_file():
        return load_npz(path, config.image_size)
    raise FileNotFoundError(f"DATA={config.source} is not 'digits', nor an existing folder of images or .npz file")


def as_found(config: DataConfig, data: ImageData) -> DataConfig:
    """The configuration with what was left to the data (size, channels, classes), so that it cannot change later."""
    names = None if data.class_names is None else tuple(data.class_names)
    return replace(config, image_size=tuple(data.image_size), channels=data.channels, class_names=names)
