"""Latent diffusion: pictures encoded once by a frozen autoencoder of diffusers; the network sees the latents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.cache import MappedArray, computed_once, digest, fingerprint
from unet_denoiser.files import read_json

ENCODED_AT_ONCE = 8  # pictures
KINDS = ("AutoencoderKL", "AutoencoderTiny")


class Autoencoder:
    """A frozen autoencoder of diffusers: pictures in [-1, 1] to scaled latents and back.

    Latents are (z - shift) * scale, with z the mode of the encoder's distribution. Shift and scale are what the
    autoencoder's configuration states: `latents_mean` and `latents_std`, else `shift_factor` and `scaling_factor`.

    Args:
        name_or_path: a folder that holds an AutoencoderKL or AutoencoderTiny, a pipeline's folder with one in `vae`, or
            a hub name.

    Raises:
        ValueError, FileNotFoundError: what cannot be loaded, in one line.
    """

    def __init__(self, name_or_path: str | Path, device: str | torch.device = "cpu") -> None:
        import diffusers

        self.name, place = str(name_or_path), Path(name_or_path)
        if self.name.startswith(("/", ".", "~")) and not place.is_dir():
            raise FileNotFoundError(f"vae={self.name} is no folder; give one, or a hub name")
        options = {"subfolder": "vae"} if (place / "vae" / "config.json").is_file() else {}
        try:
            config = diffusers.AutoencoderKL.load_config(self.name, **options)
            kind = config.get("_class_name")
            if kind not in KINDS:
                raise ValueError(f"it holds a {kind}; {' and '.join(KINDS)} are supported")
            self.model: Any = getattr(diffusers, kind).from_pretrained(self.name, torch_dtype=torch.float32, **options)
        except Exception as error:  # each of the libraries behind it has exceptions of its own
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"vae={self.name} cannot be loaded ({reason})") from error
        self.model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        c = self.model.config
        self.picture_channels: int = c.in_channels
        self.channels: int = c.latent_channels
        widths = c.block_out_channels if kind == "AutoencoderKL" else c.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        mean, std = getattr(c, "latents_mean", None), getattr(c, "latents_std", None)
        shift = getattr(c, "shift_factor", None) or 0.0
        self.shift = torch.tensor(shift if mean is None else mean, dtype=torch.float32).view(-1, 1, 1)
        self.scale = torch.ones(self.channels, 1, 1)
        self.scale *= (c.scaling_factor or 1.0) if std is None else 1 / torch.tensor(std).view(-1, 1, 1)
        self.key = digest([self.name, fingerprint([place]) if place.exists() else ""])

    @torch.inference_mode()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) pictures in [-1, 1] to (B, channels, H / factor, W / factor) latents, on the CPU."""
        return ((self.raw(pictures) - self.shift) * self.scale).clone()

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Scaled latents (B, channels, h, w) to pictures (B, C, H, W) in [-1, 1], on the CPU."""
        z = latents.float().cpu() / self.scale + self.shift
        decoded = [self.model.decode(part.to(self.device)).sample.cpu() for part in z.split(batch_size)]
        return torch.cat(decoded).clamp(-1, 1).clone()

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Shift and scale each channel by these, instead of by what the configuration states."""
        self.shift, self.scale = torch.tensor(mean).view(-1, 1, 1), 1 / torch.tensor(std).view(-1, 1, 1)

    @torch.inference_mode()
    def raw(self, pictures: Tensor) -> Tensor:
        """Latents before shift and scale."""
        encoded = self.model.encode(pictures.to(self.device))
        return (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float().cpu()


class LatentStore:
    """The latents of a data set's pictures before shift and scale, kept on disk in float16.

    Args:
        data: items with "image", and pictures in "concat" where they have it, in [-1, 1]; the same whenever an index
            is asked for.
        key: what the pictures depend on, as `digest` makes it.
        flip: keep the mirrored pictures' too.

    Raises:
        ValueError: pictures that the autoencoder cannot take.
    """

    def __init__(self, data: Any, autoencoder: Autoencoder, key: str, flip: bool = False) -> None:
        _check_fit(data, autoencoder)
        parts = [autoencoder.key, key, str(flip), str(data.concat_channels), str(len(data))]
        folder = computed_once("latents", digest(parts), lambda folder: _write_latents(data, autoencoder, flip, folder))
        self.latents, about = MappedArray(folder / "latents.npy"), read_json(folder / "about.json")
        self.mean, self.std = tuple(about["mean"]), tuple(about["std"])

    def __getitem__(self, place: tuple[int, bool]) -> Tensor:
        """Latents of (index, whether mirrored): (1 or 2 with concat, C, h, w)."""
        index, mirrored = place
        return torch.from_numpy(self.latents.array[index, int(mirrored)].astype(np.float32))


def _check_fit(data: Any, autoencoder: Autoencoder) -> None:
    name, factor = autoencoder.name, autoencoder.factor
    if len(data.image_size) != 2 or any(n % factor for n in data.image_size):
        raise ValueError(f"image_size={tuple(data.image_size)}: vae={name} takes multiples of {factor} pixels")
    if data.channels != autoencoder.picture_channels:
        raise ValueError(f"channels={data.channels}: vae={name} takes {autoencoder.picture_channels}")
    if data.concat_channels not in (0, data.channels):
        raise ValueError(f"concat: with vae={name} it must be pictures of {data.channels} channels, without a mask")


def _write_latents(data: Any, autoencoder: Autoencoder, flip: bool, folder: Path) -> None:
    """latents.npy (N, 1 or 2 mirrored, 1 or 2 with concat, C, h, w), and about.json with each channel's statistics."""
    from tqdm import trange

    size = [n // autoencoder.factor for n in data.image_size]
    pictures = 1 + bool(data.concat_channels)
    shape = (len(data), 1 + flip, pictures, autoencoder.channels, *size)
    target = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, shape)
    sums = torch.zeros(2, autoencoder.channels, dtype=torch.float64)
    names = ("image", "concat")[:pictures]
    for start in trange(0, len(data), ENCODED_AT_ONCE, desc="latents", unit_scale=ENCODED_AT_ONCE, disable=None):
        items = [data[i] for i in range(start, min(start + ENCODED_AT_ONCE, len(data)))]
        images = torch.stack([torch.stack([item[name] for name in names]) for item in items])
        images = torch.stack([images, images.flip(-1)][: 1 + flip], 1)
        z = autoencoder.raw(images.flatten(0, 2)).view(*images.shape[:3], *shape[3:])
        if not z.half().isfinite().all():
            raise ValueError(f"vae={autoencoder.name}: its latents do not fit float16")
        target[start : start + len(z)] = z.numpy()
        values = z[:, :, 0].double().transpose(0, 2).flatten(1)
        sums += torch.stack([values.sum(1), values.square().sum(1)]) / values.shape[1] * len(z) / len(data)
    target.flush()
    std = (sums[1] - sums[0].square()).clamp(min=1e-12).sqrt()
    about = {"vae": autoencoder.name, "mean": sums[0].tolist(), "std": std.tolist()}
    (folder / "about.json").write_text(json.dumps(about))
