"""Data sets around another: captions as embeddings, a picture beside the noisy one, latents instead of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.cache import digest, fingerprint
from unet_denoiser.concat import downscaled, enlarged, masked, random_mask
from unet_denoiser.data.base import ImageData, Place, augment, to_float
from unet_denoiser.data.decode import fill_colour, open_image, to_pixels
from unet_denoiser.recipe_data import DataConfig

if TYPE_CHECKING:
    from unet_denoiser.latents import Autoencoder
    from unet_denoiser.text import TextEncoder

ATTRIBUTES = (
    *("channels", "image_size", "class_names", "captions", "buckets", "in_memory", "config"),
    *("vector_dim", "context_dim", "concat_channels"),
)


class Wrapped(ImageData):
    """A data set that changes another's items."""

    def __init__(self, data: ImageData) -> None:
        self.data = data
        for name in ATTRIBUTES:
            setattr(self, name, getattr(data, name))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def conditions(self, index: int) -> dict[str, Any]:
        return self.data.conditions(index)

    def size_of(self, index: int) -> tuple[int, ...]:
        return self.data.size_of(index)


class TextData(Wrapped):
    """Captions become "context" (S, D) and "context_mask" (S,); S is the longest caption's length.

    Args:
        data: items with a "caption", and the list `captions` of them all.

    Raises:
        ValueError: data without captions.
    """

    def __init__(self, data: ImageData, encoder: TextEncoder) -> None:
        from unet_denoiser.text import TokenStore

        super().__init__(data)
        if not data.captions:
            raise ValueError(f"text_encoder={encoder.name}: the data have no captions; add them, or leave it out")
        self.store = TokenStore(encoder, data.captions)
        self.context_dim = encoder.context_dim

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._encoded(self.data[index])

    def conditions(self, index: int) -> dict[str, Any]:
        return self._encoded(self.data.conditions(index))

    def _encoded(self, item: dict[str, Any]) -> dict[str, Any]:
        context, mask = self.store[item["caption"]]
        rest = {name: value for name, value in item.items() if name != "caption"}
        return rest | {"context": context, "context_mask": mask}


class ConcatData(Wrapped):
    """Items get a "concat", channels that the network sees beside the noisy picture.

    Args:
        kind: as `DataConfig.concat`.
        paired: the other pictures, where it is a folder.

    Raises:
        ValueError: data that are no pictures, or whose size a factor does not divide.
    """

    def __init__(self, data: ImageData, kind: str, paired: ImageData | None = None) -> None:
        super().__init__(data)
        if len(data.image_size) != 2:
            raise ValueError(f"concat={kind}: the data have {len(data.image_size)} axes; pictures have 2")
        self.paired, self.inpainting = paired, kind == "inpainting"
        self.factor = int(kind.removeprefix("downscaled:")) if kind.startswith("downscaled:") else 1
        if self.factor > 1:
            downscaled(torch.zeros(1, 1, *data.image_size), self.factor)
        self.concat_channels = data.channels + 1 if self.inpainting else (paired or data).channels

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        picture = item["image"][None]
        if self.inpainting:
            entropy = [index.seed, index.position] if isinstance(index, Place) else [index]
            mask = random_mask(picture.shape[2:], np.random.default_rng([*entropy, 0, 2]))  # 2: not the augmentation's
            concat = masked(picture, mask[None])[0]
        elif self.paired is not None:
            concat = self.paired[index]["image"]
        else:
            concat = downscaled(picture, self.factor)[0]
        return item | {"concat": concat}


class LatentData(Wrapped):
    """Pictures become latents, of no fixed range; "concat", where there is one, is encoded likewise.

    Args:
        data: pictures in [-1, 1], the same whenever an index is asked for.
        key: what they depend on, as `digest` makes it.
        flip: mirror half of the samples; an autoencoder does not mirror its latents, so both kinds are kept.
        standardize: shift and scale by the measured mean and standard deviation of each channel, instead of by what
            the autoencoder's configuration states.

    Raises:
        ValueError: pictures that the autoencoder cannot take.
    """

    def __init__(
        self, data: ImageData, autoencoder: Autoencoder, key: str, *, flip: bool = False, standardize: bool = False
    ) -> None:
        from unet_denoiser.latents import LatentStore

        super().__init__(data)
        self.store, self.flip = LatentStore(data, autoencoder, key, flip), flip
        if standardize:
            autoencoder.set_statistics(self.store.mean, self.store.std)
        self.shift, self.scale = autoencoder.shift, autoencoder.scale
        size = float((torch.tensor(self.store.std).view(-1, 1, 1) * self.scale).square().mean().sqrt())
        if not 0.5 < size < 2:
            warnings.warn(
                f"the latents of {autoencoder.name} have a standard deviation of {size:.2g} by the scale that it "
                "states; training wants about 1: standardize_latents measures it",
                stacklevel=2,
            )
        self.channels, self.concat_channels = autoencoder.channels, autoencoder.channels * bool(data.concat_channels)
        self.image_size = tuple(n // autoencoder.factor for n in data.image_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mirrored = self.flip and isinstance(index, Place) and bool(index.rng().random() < 0.5)
        latents = (self.store[index, mirrored] - self.shift) * self.scale
        return dict(zip(("image", "concat"), latents, strict=False)) | self.conditions(index)

    def size_of(self, index: int) -> tuple[int, ...]:
        return self.image_size


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
        is_folder = config.concat != "inpainting" and not config.concat.startswith("downscaled:")
        paired = _paired(config.concat, data, plain, load, vae is not None) if is_folder else None
        data = ConcatData(data, config.concat, paired)
    if vae is not None:
        sources = [Path(p) for p in (config.source, config.concat or "") if p and Path(p).exists()]
        key = digest([repr(sorted(asdict(plain).items())), str(config.concat), fingerprint(sources)])
        measure = config.standardize_latents and config.latent_mean is None
        data = LatentData(data, vae, key, flip=config.horizontal_flip, standardize=measure)
    return data if encoder is None else TextData(data, encoder)


def text_encoder(config: DataConfig) -> TextEncoder:
    """The configuration's text encoder."""
    from unet_denoiser.text import TextEncoder

    assert config.text_encoder is not None
    return TextEncoder(config.text_encoder, config.caption_length)


def autoencoder(config: DataConfig) -> Autoencoder:
    """The configuration's autoencoder, with the statistics that were measured for it."""
    from unet_denoiser.latents import Autoencoder

    assert config.vae is not None
    found = Autoencoder(config.vae, "cuda" if torch.cuda.is_available() else "cpu")
    if config.latent_mean is not None and config.latent_std is not None:
        found.set_statistics(config.latent_mean, config.latent_std)
    return found


def found_around(config: DataConfig, data: Any) -> tuple[DataConfig, Any]:
    """The configuration with measured statistics and whole paths, and the pictures that everything else is around."""
    config = replace(
        config, text_encoder=_whole(config.text_encoder), vae=_whole(config.vae), concat=_whole(config.concat)
    )
    while isinstance(data, Wrapped):
        if isinstance(data, LatentData) and config.standardize_latents and config.latent_mean is None:
            config = replace(config, latent_mean=data.store.mean, latent_std=data.store.std)
        data = data.data
    return config, data


def read_concat(config: DataConfig, channels: int, image: Path) -> Tensor:
    """(1, C2, H, W) `concat` from a picture file, prepared as in training; a small one to enlarge may have any size.

    Args:
        config: that of the run.
        channels: what its network takes beside the noisy picture.

    Raises:
        ValueError: a file that is no picture, or of no use to this run.
    """
    if config.concat is None:
        raise ValueError(f"concat_image={image}: the run was trained without concat")
    if config.concat == "inpainting":
        raise ValueError(f"concat_image={image}: the run was trained for inpainting; give image, and mask or outpaint")
    wanted = (config.channels or 3) if config.vae is not None else channels
    if config.concat.startswith("downscaled:"):
        factor = int(config.concat.removeprefix("downscaled:"))
        small = read_picture(config, wanted, image, as_it_is=True)
        picture = enlarged(small, tuple(n * factor for n in small.shape[2:]))
    else:
        picture = read_picture(config, wanted, image)
    return picture if config.vae is None else autoencoder(config).encode(picture)


def read_picture(
    config: DataConfig, channels: int, image: str | Path, size: Sequence[int] | None = None, *, as_it_is: bool = False
) -> Tensor:
    """(1, channels, H, W) of a picture file in [-1, 1], prepared as in training.

    Args:
        size: height and width (default: the configuration's).
        as_it_is: keep the file's.

    Raises:
        ValueError: a file that is no picture.
    """
    opened = open_image(str(image))
    if as_it_is:
        return to_float(to_pixels(opened, channels, (opened.height, opened.width), "stretch", config.background))[None]
    size = tuple(size or config.image_size or ())  # type: ignore[arg-type]  # a run's is a tuple
    pixels = to_pixels(opened, channels, size, config.resize_mode, config.background)
    return augment(to_float(pixels), size, config, None, fill_colour(config.background, channels))[None]


def read_mask(config: DataConfig, mask: str | Path, size: Sequence[int]) -> Tensor:
    """(1, 1, H, W) bool of a picture file, True where it is more white than black; prepared as pictures are.

    Raises:
        ValueError: a file that is no picture, or has nothing white.
    """
    size = tuple(size)
    drawn = to_float(to_pixels(open_image(str(mask)), 1, size, config.resize_mode, "black"))
    white = augment(drawn, size, config, None, -torch.ones(1))[None] > 0
    if not white.any():
        raise ValueError(f"mask={mask} has nothing white, so there is nothing to paint")
    return white


def _whole(path: str | None) -> str | None:
    """The absolute path of what exists, so that a run can be used from any directory; hub names as they are."""
    return str(Path(path).absolute()) if path is not None and Path(path).exists() else path


def _paired(folder: str, data: Any, config: DataConfig, load: Callable[[DataConfig], Any], has_vae: bool) -> ImageData:
    """The pictures of a second folder, one for each of the data's; ValueError when the names differ."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"concat={folder} is neither 'downscaled:N', nor 'inpainting', nor a folder")
    if not hasattr(data, "files"):
        raise ValueError(f"concat={folder}: only a folder of images can be paired with another folder")
    plain = replace(config, class_names=None, label_column=None, caption_column=None, vector_columns=())
    channels = data.channels if has_vae else None
    paired: Any = load(replace(plain, source=folder, image_size=data.image_size, channels=channels))
    ours, theirs = ([str(Path(file).with_suffix("")) for file in each.files] for each in (data, paired))
    if unpaired := sorted(set(ours) ^ set(theirs)):
        odd = unpaired[0]
        where = folder if odd in ours else config.source
        raise ValueError(
            f"concat={folder}: {where} has no usable picture {odd}; names must be the same in both folders"
        )
    if ours != theirs or len(set(ours)) < len(ours):  # as a.png and a.jpg
        raise ValueError(f"concat={folder}: pairs need names of one order without their suffixes, and each name once")
    if data.buckets is not None and [*map(list, data.buckets)] != [*map(list, paired.buckets or ())]:
        raise ValueError(f"concat={folder}: with aspect_buckets both pictures of a pair need the same aspect")
    return paired
