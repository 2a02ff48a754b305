"""The dataset that a configuration names: where its images come from, and the wrappers around them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.columns import warn_empty_classes
from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamDataset
from unet_denoiser.data.sources.arrays import DIGITS, ArrayDataset, load_digits_data, load_npy, load_npz
from unet_denoiser.data.sources.folder_walk import list_images
from unet_denoiser.data.sources.image_folder import ImageFolder
from unet_denoiser.data.sources.parquet_files import list_tables
from unet_denoiser.data.transforms import DECODING
from unet_denoiser.data.wrappers.captions import CaptionedDataset
from unet_denoiser.data.wrappers.concat import ConcatConditionDataset
from unet_denoiser.data.wrappers.latents import LatentDataset
from unet_denoiser.models.fetch import PIPELINE_NAME
from unet_denoiser.utils.cache import digest, fingerprint

if TYPE_CHECKING:
    from unet_denoiser.models.autoencoder import Autoencoder
    from unet_denoiser.models.text_encoder import TextEncoder


WRAPPERS = ("text_encoder", "vae", "concat")


def load_data(config: DataConfig | str | Path, **options: Any) -> ImageDataset | StreamDataset:
    """Load the dataset that a configuration names.

    Args:
        config: a `DataConfig`, or its `source` alone.
        options: fields of `DataConfig`, to change or to give with a source.

    Returns:
        {"image": float32 (C, *spatial) in [-1, 1], conditions by name}; with `vae`, latents (C, h, w) of unit scale.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: data or options that cannot be used, in one line.
    """
    config = replace(config, **options) if isinstance(config, DataConfig) else DataConfig(str(config), **options)
    _check_wrappers(config)
    # both before the images, which may take minutes to verify
    encoder = None if config.text_encoder is None else load_text_encoder(config)
    vae = None if config.vae is None else load_autoencoder(config)

    source = without_wrappers(config)
    if vae is not None:  # latents are kept, so `LatentDataset` flips
        source = replace(source, horizontal_flip=False, channels=config.channels or vae.image_channels)
    data: Any = _load_source(source)
    if isinstance(data, ImageDataset) and data.labels is not None:
        warn_empty_classes(data.labels, data.class_names or [], config.source)
    if config.concat is not None:
        data = ConcatConditionDataset(data, config, _load_paired(config, source, data))
    if vae is not None:
        measure = config.standardize_latents and config.latent_mean is None
        paths = [Path(path) for path in (config.source, config.concat or "") if path and Path(path).exists()]
        # of all that the images depend on: options and files of the source, and `concat` and its files
        parts = [repr(sorted(asdict(source).items())), str(config.concat), fingerprint(paths)]
        key = digest([*parts, *([] if isinstance(data, ArrayDataset) else [DECODING])])
        data = LatentDataset(data, vae, key, flip=config.horizontal_flip, standardize=measure)
    return data if encoder is None else CaptionedDataset(data, encoder)


def _load_source(config: DataConfig) -> ImageDataset | StreamDataset:
    """Load the images, with labels, captions and vectors, that `config.source` names."""
    path = Path(config.source)
    if config.source in DIGITS:
        return load_digits_data(config)
    tables = [file for file in list_tables(path) if Path(file).stem.lower() != "metadata"] if path.is_dir() else []
    images = list_images(path) if tables else []
    if images:
        found = f"{path} has images, which are used, and {len(tables)} .parquet files, which are not"
        warnings.warn(f"{found}; give the folder of the .parquet files to use them", stacklevel=3)
    if config.source.startswith("hf:") or path.suffix.lower() == ".parquet" or (tables and not images):
        from unet_denoiser.data.sources.huggingface import load_hub

        return load_hub(config)
    if path.is_dir():
        return ImageFolder(path, config)
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return (load_npz if path.suffix.lower() == ".npz" else load_npy)(path, config)
    others = "nor an existing folder of images, nor an .npz, .npy or .parquet file, nor hf:NAME"
    raise FileNotFoundError(f"DATA={config.source} is not 'digits', {others}")


def check_places(config: DataConfig, whose: str, options: Sequence[str] = ("source", *WRAPPERS)) -> None:
    """Raise FileNotFoundError if a place in a run's data is gone, and name the option that says where it is now."""
    folder = config.concat_kind and config.concat_kind.folder
    places = {"source": config.source, "text_encoder": config.text_encoder, "vae": config.vae, "concat": folder}
    for name in options:
        place = places[name]
        if place and Path(place).is_absolute() and not Path(place).exists():
            option = "data" if name == "source" else name.replace("_", "-")
            raise FileNotFoundError(f"{whose} {option}={place} does not exist; give --{option} if it has moved")


def without_wrappers(config: DataConfig) -> DataConfig:
    """Return the configuration of the source alone: no text encoder, no autoencoder and no `concat`."""
    names = ("text_encoder", "caption_length", "vae", "latent_mean", "latent_std", "concat")
    unset: dict[str, Any] = dict.fromkeys(names)
    return replace(config, standardize_latents=False, **unset)


def _check_wrappers(config: DataConfig) -> None:
    given = [name for name in WRAPPERS if getattr(config, name) is not None]
    if given and config.streaming:
        raise ValueError(f"{given[0]} with streaming=True: it needs all items beforehand; leave streaming out")
    if config.vae is not None and config.resize_mode == "random_crop":
        raise ValueError("resize_mode='random_crop' with vae: an image has one latent, so one crop; use 'center_crop'")
    if config.vae is not None and config.aspect_buckets:
        raise ValueError("aspect_buckets=True with vae: latents of one size only are kept; leave one of them out")


def _load_paired(config: DataConfig, source: DataConfig, data: ImageDataset) -> ImageDataset | None:
    """Load the images of the folder `concat`, paired with `data` by their names; None if `concat` is no folder."""
    folder = config.concat_kind and config.concat_kind.folder
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"concat={folder} is neither 'downscaled:N', nor 'inpainting', nor a folder")
    if not isinstance(data, ImageFolder):
        raise ValueError(f"concat={folder}: only a folder of images can be paired with another folder")
    # an autoencoder takes as many channels from both images
    channels = None if config.vae is None else data.channels
    options = replace(source, class_names=None, label_column=None, caption_column=None, vector_columns=())
    options = replace(options, source=folder, image_size=data.image_size, channels=channels)
    paired = ImageFolder(folder, options)
    names, paired_names = ([str(Path(file).with_suffix("")) for file in each.files] for each in (data, paired))
    if unpaired := sorted(set(names) ^ set(paired_names)):
        found = f"{folder if unpaired[0] in names else config.source} has no usable image {unpaired[0]}"
        raise ValueError(f"concat={folder}: {found}; names must be the same in both folders")
    if names != paired_names or len(set(names)) < len(names):  # for example a.png and a.jpg
        raise ValueError(f"concat={folder}: pairs need names of one order without their suffixes, and each name once")
    if data.buckets is not None and [*map(list, data.buckets)] != [*map(list, paired.buckets or ())]:
        raise ValueError(f"concat={folder}: with aspect_buckets both images of a pair need the same aspect")
    return paired


def load_text_encoder(config: DataConfig) -> TextEncoder:
    """Load the text encoder that `config.text_encoder` names, or those of the pipeline in that folder."""
    from unet_denoiser.models.prompt_encoder import PromptEncoder
    from unet_denoiser.models.text_encoder import TextEncoder

    assert config.text_encoder is not None
    if Path(config.text_encoder, PIPELINE_NAME).is_file():
        return PromptEncoder(config.text_encoder, config.caption_length)
    return TextEncoder(config.text_encoder, config.caption_length)


def load_autoencoder(config: DataConfig) -> Autoencoder:
    """Load the autoencoder that `config.vae` names, with the latents' statistics if the configuration has them."""
    from unet_denoiser.models.autoencoder import Autoencoder

    assert config.vae is not None
    autoencoder = Autoencoder(config.vae, "cuda" if torch.cuda.is_available() else "cpu")
    if config.latent_mean is not None and config.latent_std is not None:
        autoencoder.set_statistics(config.latent_mean, config.latent_std)
    return autoencoder


def with_found_values(config: DataConfig, data: ImageDataset | StreamDataset) -> DataConfig:
    """Fill in image size, channels, class names and the latents' statistics from `data`, so that they cannot change.

    Paths become absolute, so that a run can be used from any directory.
    """
    folder = config.concat_kind and config.concat_kind.folder
    paths = {"text_encoder": config.text_encoder, "vae": config.vae, "concat": folder}  # or names on the hub
    absolute: Any = {name: str(Path(p).absolute()) for name, p in paths.items() if p and Path(p).exists()}
    config = replace(config, **absolute)
    while isinstance(data, DatasetWrapper):  # down to the source, which has the images' size and channels
        if isinstance(data, LatentDataset) and config.standardize_latents and config.latent_mean is None:
            config = replace(config, latent_mean=data.mean, latent_std=data.std)
        data = data.data
    names = None if data.class_names is None else tuple(data.class_names)
    return replace(config, image_size=tuple(data.image_size), channels=data.channels, class_names=names)


def first_item(data: ImageDataset | StreamDataset) -> dict[str, Any]:
    """Return an item, to see which conditions the data have."""
    return next(iter(data)) if isinstance(data, StreamDataset) else data[0]
