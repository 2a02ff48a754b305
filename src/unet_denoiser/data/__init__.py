"""Data sets as tensors: folders, tables and streams of images, arrays, data sets of one's own; and their loader.

`base.py` says what a data set is. folder.py, hub.py (over pictures.py, decode.py and scan.py) and arrays.py are the
sources, stream.py and own.py the other kinds, conditioned.py what goes around them (captions, latents, pictures to
concatenate), loader.py the endless order of training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from unet_denoiser.data.arrays import DIGITS, load_digits_data, load_npy, load_npz
from unet_denoiser.data.arrays import ArrayData as ArrayData
from unet_denoiser.data.arrays import digits as digits
from unet_denoiser.data.base import ImageData as ImageData
from unet_denoiser.data.base import Place as Place
from unet_denoiser.data.base import UnreadableItemError as UnreadableItemError
from unet_denoiser.data.conditioned import found_around, with_conditions
from unet_denoiser.data.folder import FolderData as FolderData
from unet_denoiser.data.folder import list_images
from unet_denoiser.data.loader import DataTimer as DataTimer
from unet_denoiser.data.loader import EndlessBatches as EndlessBatches
from unet_denoiser.data.loader import make_loader as make_loader
from unet_denoiser.data.own import as_data as as_data
from unet_denoiser.data.stream import StreamData as StreamData
from unet_denoiser.recipe_data import DataConfig


def load_data(config: DataConfig | str | Path, **options: Any) -> ImageData | StreamData:
    """The data set that a configuration names.

    Args:
        config: a `DataConfig`, or its `source` alone.
        options: its other fields, to change or to give with a source.

    Raises:
        FileNotFoundError, ValueError, TypeError: what is wrong with it, in one line.
    """
    config = replace(config, **options) if isinstance(config, DataConfig) else DataConfig(str(config), **options)
    return with_conditions(config, _load_pictures)


def _load_pictures(config: DataConfig) -> ImageData | StreamData:
    path = Path(config.source)
    if config.source in DIGITS:
        return load_digits_data(config)
    if config.source.startswith("hf:") or path.suffix == ".parquet" or _is_table(path):
        from unet_denoiser.data.hub import load_hub

        return load_hub(config)
    if path.is_dir():
        return FolderData(path, config)
    if path.is_file() and path.suffix in (".npz", ".npy"):
        return (load_npz if path.suffix == ".npz" else load_npy)(path, config)
    raise FileNotFoundError(
        f"DATA={config.source} is not 'digits', nor an existing folder of images, nor an .npz, .npy or .parquet file, "
        "nor hf:NAME"
    )


def _is_table(path: Path) -> bool:
    """A folder of Parquet files and no images."""
    return path.is_dir() and next(path.rglob("*.parquet"), None) is not None and not list_images(path)


def as_found(config: DataConfig, data: ImageData | StreamData) -> DataConfig:
    """The configuration with what was left to the data (size, channels, classes), so that it cannot change later."""
    config, data = found_around(config, data)
    names = None if data.class_names is None else tuple(data.class_names)
    return replace(config, image_size=tuple(data.image_size), channels=data.channels, class_names=names)


def first_item(data: ImageData | StreamData) -> dict[str, Any]:
    """An item, to see which conditions the data have."""
    return next(iter(data)) if isinstance(data, StreamData) else data[0]
