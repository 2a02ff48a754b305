"""Latent diffusion: pictures encoded once by a frozen autoencoder of diffusers; the network sees the latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.utils.cache import digest, fingerprint

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
