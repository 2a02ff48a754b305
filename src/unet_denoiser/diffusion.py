"""The diffusion process: schedule, what the network predicts, loss and data range, in one object saved as one file.

Training and sampling both take it, so they cannot disagree. In the variance-preserving form that DDPM uses,
x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = product of (1 - beta) and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from unet_denoiser.files import read_json, write_atomically
from unet_denoiser.objectives import Losses
from unet_denoiser.pretrained import signature_of
from unet_denoiser.recipe import DiffusionConfig, PredictionType

SCHEDULER_NAME = "scheduler_config.json"


class Diffusion:
    """A forward process and what a network learns of it, kept as a `diffusers` scheduler's configuration.

    The arguments are `DiffusionConfig`'s, described there.

    Raises:
        ValueError: an option that cannot work.
    """

    @signature_of(DiffusionConfig)
    def __init__(self, **options: Any) -> None:
        config = asdict(DiffusionConfig(**options))
        clip = config["clip_sample_range"]
        config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "timestep_spacing": "trailing"}
        self._set(config)

    def _set(self, config: Mapping[str, Any]) -> None:
        self.scheduler = DDPMScheduler.from_config(dict(config))
        self.prediction_type: PredictionType = self.scheduler.config.prediction_type
        self.alphas: Tensor = self.scheduler.alphas_cumprod.sqrt()
        self.sigmas: Tensor = (1 - self.scheduler.alphas_cumprod).sqrt()

    @property
    def num_train_timesteps(self) -> int:
        """T; timesteps are 0 to T - 1."""
        return len(self.alphas)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """Bounds of the data, which predicted x0 are clipped to; None for unbounded data."""
        r = self.scheduler.config.clip_sample_range
        return (-r, r) if self.scheduler.config.clip_sample else None

    # ---- training --------------------------------------------------------------------------------------------------

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t noise (DDPM, equation 4); x0 and noise (B, ...), t (B,) integers."""
        alpha, sigma = self._at(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for `add_noise(x0, noise, t)`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self._at(t, x0)
        return alpha * noise - sigma * x0

    def loss(self, model: Callable[..., Tensor], x0: Tensor, **options: Any) -> Tensor:
        """What is minimised, one value per sample: (B,); options as for `losses`, which tells more of it."""
        return self.losses(model, x0, **options).loss

    def losses(
        self,
        model: Callable[..., Tensor],
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        **inputs: Any,
    ) -> Losses:
        """Mean squared error of the network's output, per sample, in float32 (DDPM, equation 14).

        Args:
            model: called as model(x_t, t, **inputs).
            x0: (B, ...) data.
            t, noise: drawn uniformly and from N(0, 1) unless given.
        """
        t = torch.randint(self.num_train_timesteps, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        output = model(self.add_noise(x0, noise, t), t, **inputs)
        error = (output.float() - self.target(x0, noise, t).float()).square().flatten(1).mean(1)
        return Losses(error, error, t)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped to multiply with `like`."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self.alphas.to(t.device)[t].view(shape).to(like), self.sigmas.to(t.device)[t].view(shape).to(like)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def predict_x0(self, output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, clip: bool = True) -> Tensor:
        """The clean data that an output of the network at x_t stands for, clipped to the data's range."""
        if self.prediction_type == "epsilon":
            x0 = (xt - sigma * output) / alpha
        elif self.prediction_type == "sample":
            x0 = output
        else:
            x0 = alpha * xt - sigma * output
        return x0.clamp(*self.data_range) if clip and self.data_range else x0

    # ---- the file --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The `scheduler_config.json` form; `diffusers` reads it too."""
        return json.loads(self.scheduler.to_json_string())

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Diffusion:
        """From the contents of any `diffusers` scheduler's `scheduler_config.json` of the DDPM family.

        Raises:
            ValueError: a schedule or prediction type outside that family.
        """
        DiffusionConfig(**{field.name: config[field.name] for field in fields(DiffusionConfig) if field.name in config})
        self = cls.__new__(cls)
        self._set(config)
        return self

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json`, whole or not at all."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        text = self.scheduler.to_json_string()
        write_atomically(Path(save_directory) / SCHEDULER_NAME, lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Diffusion:
        """Read `scheduler_config.json`; FileNotFoundError or ValueError when it is not there or not readable."""
        return cls.from_dict(read_json(Path(directory) / SCHEDULER_NAME))
