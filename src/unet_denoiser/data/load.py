"""The data set that a configuration names, and what is wrapped around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamDataset
from unet_denoiser.data.sources.arrays import DIGITS, load_digits_data, load_npy, load_npz
from unet_denoiser.data.sources.image_folder import ImageFolder, list_images
from unet_denoiser.data.wrappers.captions import CaptionedDataset
from unet_denoiser.data.wrappers.concat import ConcatConditionDataset, _paired
from unet_denoiser.data.wrappers.latents import LatentDataset
from unet_denoiser.utils.cache import digest, fingerprint

if TYPE_CHECKING:
    from unet_denoiser.models.autoencoder import Autoencoder
    from unet_denoiser.models.text_encoder import TextEncoder


def load_data(config: DataConfig | str | Path, **options: Any) -> ImageDataset | StreamDataset:
    """The data set that a configuration names.

    Args:
        config: a `DataConfig`, or its `source` alone.
        options: its other fields, to change or to give with a source.

    Raises:
        FileNotFoundError, ValueError, TypeError: what is wrong with it, in one line.
    """
    config = replace(config, **options) if isinstance(config, DataConfig) else DataConfig(str(config), **options)
    return with_conditions(config, _load_pictures)


def _load_pictures(config: DataConfig) -> ImageDataset | StreamDataset:
    path = Path(config.source)
    if config.source in DIGITS:
        return load_digits_data(config)
    if config.source.startswith("hf:") or path.suffix == ".parquet" or _is_table(path):
        from unet_denoiser.data.sources.huggingface import load_hub

        return load_hub(config)
    if path.is_dir():
        return ImageFolder(path, config)
    if path.is_file() and path.suffix in (".npz", ".npy"):
        return (load_npz if path.suffix == ".npz" else load_npy)(path, config)
    raise FileNotFoundError(
        f"DATA={config.source} is not 'digits', nor an existing folder of images, nor an .npz, .npy or .parquet file, "
        "nor hf:NAME"
    )


def _is_table(path: Path) -> bool:
    """A folder of Parquet files and no images."""
    return path.is_dir() and next(path.rglob("*.parquet"), None) is not None and not list_images(path)


def with_found_values(config: DataConfig, data: ImageDataset | StreamDataset) -> DataConfig:
    """The configuration with what was left to the data (size, channels, classes), so that it cannot change later."""
    config, data = unwrap(config, data)
    names = None if data.class_names is None else tuple(data.class_names)
    return replace(config, image_size=tuple(data.image_size), channels=data.channels, class_names=names)


def first_item(data: ImageDataset | StreamDataset) -> dict[str, Any]:
    """An item, to see which conditions the data have."""
    return next(iter(data)) if isinstance(data, StreamDataset) else data[0]


def with_conditions(config: DataConfig, load: Callable[[DataConfig], Any]) -> Any:
    """The pictures that `load` finds, with what the configuration asks for around them.

    Raises:
        FileNotFoundError, ValueError, ImportError: an encoder, autoencoder or folder that cannot be used, in one line.
    """
    wanted = [name for name in ("text_encoder", "vae", "concat") if getattr(config, name) is not None]
    if wanted and config.streaming:
        raise ValueError(f"{wanted[0]} with streaming=True: it needs all items beforehand; leave streaming out")
    plain = replace(config, text_encoder=None, caption_length=None, concat=None)
    plain = replace(plain, vae=None, standardize_latents=False, latent_mean=None, latent_std=None)
    encoder = None if config.text_encoder is None else text_encoder(config)  # the quick checks first
    vae = None if config.vae is None else autoencoder(config)
    if vae is not None:
        if config.resize_mode == "random_crop":
            raise ValueError(
                "resize_mode='random_crop' with vae: latents are kept, so crops cannot vary; use 'center_crop'"
            )
        if config.aspect_buckets:
            raise ValueError("aspect_buckets=True with vae: latents of one size only are kept; leave one of them out")
        plain = replace(plain, horizontal_flip=False, channels=config.channels or vae.picture_channels)
    data = load(plain)
    if config.concat is not None:
        kind = config.concat_kind
        is_folder = kind is not None and kind.folder is not None
        paired = _paired(config.concat, data, plain, load, vae is not None) if is_folder else None
        data = ConcatConditionDataset(data, config, paired)
    if vae is not None:
        sources = [Path(p) for p in (config.source, config.concat or "") if p and Path(p).exists()]
        key = digest([repr(sorted(asdict(plain).items())), str(config.concat), fingerprint(sources)])
        measure = config.standardize_latents and config.latent_mean is None
        data = LatentDataset(data, vae, key, flip=config.horizontal_flip, standardize=measure)
    return data if encoder is None else CaptionedDataset(data, encoder)


def text_encoder(config: DataConfig) -> TextEncoder:
    """The configuration's text encoder."""
    from unet_denoiser.models.text_encoder import TextEncoder

    assert config.text_encoder is not None
    return TextEncoder(config.text_encoder, config.caption_length)


def autoencoder(config: DataConfig) -> Autoencoder:
    """The configuration's autoencoder, with the statistics that were measured for it."""
    from unet_denoiser.models.autoencoder import Autoencoder

    assert config.vae is not None
    found = Autoencoder(config.vae, "cuda" if torch.cuda.is_available() else "cpu")
    if config.latent_mean is not None and config.latent_std is not None:
        found.set_statistics(config.latent_mean, config.latent_std)
    return found


def unwrap(config: DataConfig, data: Any) -> tuple[DataConfig, Any]:
    """The configuration with measured statistics and whole paths, and the pictures that everything else is around."""
    config = replace(
        config, text_encoder=_whole(config.text_encoder), vae=_whole(config.vae), concat=_whole(config.concat)
    )
    while isinstance(data, DatasetWrapper):
        if isinstance(data, LatentDataset) and config.standardize_latents and config.latent_mean is None:
            config = replace(config, latent_mean=data.store.mean, latent_std=data.store.std)
        data = data.data
    return config, data


def _whole(path: str | None) -> str | None:
    """The absolute path of what exists, so that a run can be used from any directory; hub names as they are."""
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path
