"""A frozen autoencoder (VAE) of diffusers: images to latents and back, for latent diffusion (Rombach et al. 2022)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.paths import expand_home
from unet_denoiser.models.pretrained import describe_load_errors
from unet_denoiser.utils.cache import digest, fingerprint

KINDS = ("AutoencoderKL", "AutoencoderTiny")  # and VQModel, the first of them (LDM)


class Autoencoder:
    """A frozen autoencoder: images in [-1, 1] to scaled latents and back.

    Latents are (z - shift) * scale, with z the mode of the encoder's distribution. Shift and scale come from the
    autoencoder's configuration: `latents_mean` and `latents_std`, else `shift_factor` and `scaling_factor`.

    Args:
        name_or_path: a folder that holds an AutoencoderKL, AutoencoderTiny or VQModel, a pipeline's folder with one in
            `vae` or `vqvae`, or a hub name.
        device: for the computations; inputs and outputs are on the CPU.

    Raises:
        FileNotFoundError, ValueError: an autoencoder that cannot be loaded.
    """

    def __init__(self, name_or_path: str | Path, device: str | torch.device = "cpu") -> None:
        import diffusers

        self.name = expand_home(str(name_or_path))
        place = Path(self.name)
        if self.name.startswith(("/", ".")) and not place.is_dir():
            raise FileNotFoundError(f"vae={self.name} is no folder; give one, or a hub name")
        parts = [part for part in ("vae", "vqvae") if (place / part / "config.json").is_file()]
        options = {"subfolder": parts[0]} if parts else {}
        with describe_load_errors(f"vae={self.name}", f"a folder or hub name of an {' or '.join(KINDS)}"):
            config = diffusers.AutoencoderKL.load_config(self.name, **options)
            kind = config.get("_class_name")
            if kind not in (*KINDS, "VQModel"):
                raise ValueError(f"it holds a {kind}; {' and '.join(KINDS)} are supported, and VQModel")
            self.model: Any = getattr(diffusers, kind).from_pretrained(self.name, torch_dtype=torch.float32, **options)
        self.model.eval().requires_grad_(False).to(device)
        self.device = torch.device(device)
        c = self.model.config
        self.image_channels, self.channels = int(c.in_channels), int(c.latent_channels)
        widths = c.encoder_block_out_channels if kind == "AutoencoderTiny" else c.block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        mean, std = getattr(c, "latents_mean", None), getattr(c, "latents_std", None)
        shift = getattr(c, "shift_factor", None) or 0.0
        self.shift = torch.tensor(shift if mean is None else mean, dtype=torch.float32).view(-1, 1, 1)
        self.scale = torch.ones(self.channels, 1, 1)
        self.scale *= (c.scaling_factor or 1.0) if std is None else 1 / torch.tensor(std).view(-1, 1, 1)
        self.key = digest([self.name, fingerprint([place]) if place.exists() else ""])

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to latents (B, channels, H / factor, W / factor)."""
        return ((self.encode_unscaled(images) - self.shift) * self.scale).clone()

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """Decode scaled latents (B, channels, h, w) to images (B, C, H, W) in [-1, 1]."""
        z = latents.float().cpu() / self.scale + self.shift
        decoded = [self.model.decode(part.to(self.device)).sample.cpu() for part in z.split(batch_size)]
        return torch.cat(decoded).clamp(-1, 1).clone()

    def set_statistics(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Shift and scale each channel by this mean and standard deviation, in place of the configuration's."""
        self.shift, self.scale = torch.tensor(mean).view(-1, 1, 1), 1 / torch.tensor(std).view(-1, 1, 1)

    @torch.inference_mode()
    def encode_drawn(self, images: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Encode each image of a batch as `encode`, but to a draw from its distribution by its generator."""
        drawn = []
        for image, generator in zip(images, generators, strict=True):
            encoded = self.model.encode(image[None].to(self.device))
            has_draws = hasattr(encoded, "latent_dist")
            drawn.append(encoded.latent_dist.sample(generator) if has_draws else encoded.latents)
        return ((torch.cat(drawn).float().cpu() - self.shift) * self.scale).clone()

    @torch.inference_mode()
    def encode_unscaled(self, images: Tensor) -> Tensor:
        """Encode images to latents before shift and scale."""
        encoded = self.model.encode(images.to(self.device))
        return (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float().cpu()
