"""Images as latents of a VAE, kept on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamIndex
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.cache import MappedArray, compute_once, digest
from unet_denoiser.utils.files import read_json, write_json

if TYPE_CHECKING:
    from unet_denoiser.models.autoencoder import Autoencoder

ENCODE_BATCH_SIZE = 8  # images


class LatentDataset(DatasetWrapper):
    """Replaces "image" and, if there is one, "concat" by their latents (C, h, w), kept on disk in float16.

    Latents are scaled to a standard deviation of about 1 and have no fixed range. `mean` and `std` hold each channel's
    statistics before that.

    Args:
        data: images in [-1, 1] that do not change from call to call.
        key: hash of all that the images depend on, from `digest`.
        flip: mirror half of the samples. The latents of a mirrored image are not the mirrored latents: both are kept.
        standardize: shift and scale by `mean` and `std`, instead of by what the autoencoder's configuration states.

    Raises:
        ValueError: images that the autoencoder cannot take.
    """

    def __init__(
        self, data: ImageDataset, autoencoder: Autoencoder, key: str, *, flip: bool = False, standardize: bool = False
    ) -> None:
        super().__init__(data)
        _check_images(data, autoencoder)
        parts = [autoencoder.key, key, str(flip), str(data.concat_channels), str(len(data))]
        folder = compute_once("latents", digest(parts), lambda folder: _write_latents(data, autoencoder, flip, folder))
        self.latents, about, self.flip = MappedArray(folder / "latents.npy"), read_json(folder / "about.json"), flip
        self.mean, self.std = tuple(about["mean"]), tuple(about["std"])
        if standardize:
            autoencoder.set_statistics(self.mean, self.std)
        self.shift, self.scale = autoencoder.shift, autoencoder.scale
        std = float((append_dims(torch.tensor(self.std), 3) * self.scale).square().mean().sqrt())
        if not 0.5 < std < 2:
            found = f"the latents of {autoencoder.name} have a standard deviation of {std:.2g} by its stated scale"
            warnings.warn(f"{found}; training wants about 1: standardize_latents measures it", stacklevel=2)
        self.channels, self.concat_channels = autoencoder.channels, autoencoder.channels * bool(data.concat_channels)
        self.image_size = tuple(n // autoencoder.factor for n in data.image_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mirrored = self.flip and isinstance(index, StreamIndex) and bool(index.rng().random() < 0.5)
        kept = self.latents.array[index, int(mirrored)].astype(np.float32)  # (1, C, h, w); (2, C, h, w) with "concat"
        latents = (torch.from_numpy(kept) - self.shift) * self.scale
        return dict(zip(("image", "concat"), latents, strict=False)) | self.conditions(index)


def _check_images(data: ImageDataset, autoencoder: Autoencoder) -> None:
    name, factor = autoencoder.name, autoencoder.factor
    if len(data.image_size) != 2 or any(n % factor for n in data.image_size):
        raise ValueError(f"image_size={tuple(data.image_size)}: vae={name} takes multiples of {factor} pixels")
    if data.channels != autoencoder.image_channels:
        raise ValueError(f"channels={data.channels}: vae={name} takes {autoencoder.image_channels}")
    if data.concat_channels not in (0, data.channels):
        raise ValueError(f"concat: with vae={name} it must be images of {data.channels} channels, without a mask")


def _write_latents(data: ImageDataset, autoencoder: Autoencoder, flip: bool, folder: Path) -> None:
    """Write latents.npy (N, 1 or 2 with mirrored images, 1 or 2 with "concat", C, h, w), and about.json."""
    from tqdm import trange

    size = [n // autoencoder.factor for n in data.image_size]
    names = ("image", "concat")[: 1 + bool(data.concat_channels)]
    shape = (len(data), 1 + flip, len(names), autoencoder.channels, *size)
    target = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    sums = torch.zeros(2, autoencoder.channels, dtype=torch.float64)  # of values and of their squares
    for start in trange(0, len(data), ENCODE_BATCH_SIZE, desc="latents", unit_scale=ENCODE_BATCH_SIZE, disable=None):
        items = [data[i] for i in range(start, min(start + ENCODE_BATCH_SIZE, len(data)))]
        images = torch.stack([torch.stack([item[name] for name in names]) for item in items])  # (B, K, C, H, W)
        images = torch.stack([images, images.flip(-1)][: 1 + flip], 1)  # (B, M, K, C, H, W)
        z = autoencoder.encode_unscaled(images.flatten(0, 2)).view(*images.shape[:3], *shape[3:])
        if not z.half().isfinite().all():
            raise ValueError(f"vae={autoencoder.name}: its latents do not fit float16")
        target[start : start + len(z)] = z.numpy()
        values = z[:, :, 0].double().transpose(0, 2).flatten(1)  # (C, M * B * h * w), without "concat"
        sums += torch.stack([values.sum(1), values.square().sum(1)]) / values.shape[1] * len(z) / len(data)
    target.flush()
    mean, std = sums[0], (sums[1] - sums[0].square()).clamp(min=1e-12).sqrt()
    write_json(folder / "about.json", {"vae": autoencoder.name, "mean": mean.tolist(), "std": std.tolist()})
