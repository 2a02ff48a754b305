"""The diffusion process: noise schedule, prediction type and data range, in one object saved as one file.

Training and sampling both take it, so they cannot disagree. Its x_t = alpha_t x0 + sigma_t eps is variance preserving,
alpha_t^2 + sigma_t^2 = 1, whatever the path.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from unet_denoiser.config.base import PathName, VarianceType, signature_of
from unet_denoiser.config.diffusion import DiffusionConfig
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.paths import PATHS, density_quantiles
from unet_denoiser.diffusion.predictions import get_prediction
from unet_denoiser.diffusion.scheduler_config import Options, change_options, make_scheduler, read_options, to_options
from unet_denoiser.diffusion.vlb import VariationalBound
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.files import read_json, write_json

SCHEDULER_NAME = "scheduler_config.json"


class StepRules(NamedTuple):
    """Rules of diffusers' schedulers that the images of a published pipeline follow; by default ours.

    Args:
        steps_offset: is added to the timesteps of "leading" spacing.
        ends_noisy: ddim ends at the noise level of timestep 0, not at x0 (set_alpha_to_one=False).
        keeps_noise: ddim goes on with the noise that was predicted before x0 was clipped.
    """

    steps_offset: int = 0
    ends_noisy: bool = False
    keeps_noise: bool = False


class Diffusion:
    """A forward process and the quantity that a network learns of it, kept as a `diffusers` scheduler's configuration.

    It takes the arguments of `DiffusionConfig`.

    Attributes:
        num_train_timesteps: T; timesteps are 0 to T - 1.
        alphas, sigmas, snr: (T,) of every timestep; snr is the signal-to-noise ratio alpha^2 / sigma^2.
        ratios: (T,) sigma / alpha in float64, finite also for pure noise.
        times: (T,) what the network is fed at every timestep.
        quantiles: (T,) the timesteps that training draws, each with the same probability.
        learns_variance: True if the second half of the network's output is a variance.
        data_range: bounds of the data, to which predicted x0 are clipped; None for unbounded data.
        step_rules: how samplers step; only a published pipeline's differ. They are not saved.
        distillation: the steps of a distilled network; None for a network that predicts as the prediction type says.

    Raises:
        ValueError: an option that cannot work.
    """

    step_rules = StepRules()

    @signature_of(DiffusionConfig)
    def __init__(self, **options: Any) -> None:
        self._configure(to_options(DiffusionConfig(**options)) | {"timestep_spacing": "trailing"})

    def _configure(self, options: Options) -> None:
        options = dict(options)
        distilled = options.pop("distillation", None)
        self.distillation = None if distilled is None else DistillationConfig(**distilled)
        self.path: PathName = options["path"]
        self.prediction_type: str = options["prediction_type"]
        self.variance_type: VarianceType = options["variance_type"]
        self.self_conditioning: bool = options["self_conditioning"]
        self.sigma_data: float = options.get("sigma_data", 1.0)
        self.prediction = get_prediction(self.prediction_type, self.sigma_data)
        self.scheduler = make_scheduler(options)
        if self.distillation is not None:  # an option that diffusers does not have, but keeps in the file
            self.scheduler.register_to_config(distillation=asdict(self.distillation))
        self.alphas, self.sigmas, betas, self.ratios, self.times = PATHS[self.path].levels(self.scheduler)
        self.quantiles, self.snr = density_quantiles(options, self.ratios), (self.alphas / self.sigmas).square()
        self.num_train_timesteps, self.learns_variance = len(self.alphas), self.variance_type == "learned_range"
        r = options["clip_sample_range"]
        self.data_range: tuple[float, float] | None = (-r, r) if options["clip_sample"] else None
        self.bound = VariationalBound(betas)
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return (alphas, sigmas) (2, T), times and quantiles on a device; moved once, as torch waits for each copy."""
        if device not in self._tables:
            alphas_sigmas = torch.stack([self.alphas, self.sigmas])
            self._tables[device] = (alphas_sigmas.to(device), self.times.to(device), self.quantiles.to(device))
        return self._tables[device]

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t of integer timesteps t (B,), shaped to multiply with `like` (B, ...)."""
        alpha, sigma = self._table(t.device)[0][:, t].to(like.dtype)  # (B,) each
        return append_dims(alpha, like.ndim), append_dims(sigma, like.ndim)

    def time(self, t: Tensor) -> Tensor:
        """Return what the network is fed at integer timesteps t (B,)."""
        return self._table(t.device)[1][t]

    def timestep(self, quantile: Tensor) -> Tensor:
        """Return the timesteps (B,) at quantiles (B,), integers from 0 to T - 1, of the density of training times."""
        return self._table(quantile.device)[2][quantile]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha_t x0 + sigma_t noise (DDPM, equation 4); x0 and noise (B, ...), t (B,) integers."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the output that the network should give for `add_noise(x0, noise, t)`."""
        return self.prediction.target(x0, noise, *self.alpha_sigma(t, x0))

    def predict_x0(self, output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, clip: bool = True) -> Tensor:
        """Return the x0 that a network's output at x_t stands for, clipped to the data's range."""
        x0 = self.prediction.x0(output, xt, alpha, sigma)
        return self.clip(x0) if clip else x0

    def network_input(self, xt: Tensor, alpha: Tensor, sigma: Tensor, x0_estimate: Tensor | None = None) -> Tensor:
        """Return what the network sees of x_t: c_in x_t; with self-conditioning, then an estimate of x0 (B, C, ...)."""
        xt = self.prediction.c_in(alpha, sigma) * xt
        return xt if x0_estimate is None else torch.cat([xt, x0_estimate], dim=1)

    def clip(self, x0: Tensor) -> Tensor:
        """Clip x0 to the data's range, if it has one."""
        return x0.clamp(*self.data_range) if self.data_range else x0

    def channels(self, data_channels: int, concat_channels: int = 0) -> dict[str, int]:
        """Return `in_channels` and `out_channels` of a network for this process and these channels."""
        in_channels = data_channels * (2 if self.self_conditioning else 1)
        out_channels = data_channels * (2 if self.learns_variance else 1)
        return {"in_channels": in_channels + concat_channels, "out_channels": out_channels}

    def data_channels(self, config: UNetConfig) -> int:
        """Return the channels of a network's samples."""
        return config.out_channels // (2 if self.learns_variance else 1)

    def concat_channels(self, config: UNetConfig) -> int:
        """Return the number of channels that a network takes beside x_t and the estimate of x0."""
        return config.in_channels - self.channels(self.data_channels(config))["in_channels"]

    def check_channels(self, config: UNetConfig, data_channels: int | None = None, concat_channels: int = 0) -> int:
        """Return the channels of the data, by default from `out_channels`, if the network fits this process.

        Raises:
            ValueError: a network with other channels, such as one with a learned variance for a process without.
        """
        count = data_channels or self.data_channels(config)
        for name, wanted in self.channels(count, concat_channels).items():
            if (found := getattr(config, name)) != wanted:
                owner = "data" if data_channels else "samples"
                hint = self._explain_channels(config, wanted, concat_channels)
                raise ValueError(f"{name}={found}, but the {owner} have {count} channels; {hint}")
        return count

    def _explain_channels(self, config: UNetConfig, wanted: int, concat_channels: int) -> str:
        """Say which options ask for `wanted` channels, and which option would suit the network."""
        options = f"variance_type={self.variance_type!r} and self_conditioning={self.self_conditioning}"
        options += f" and {concat_channels} channels of concat" if concat_channels else ""
        hint = f"with {options} it must be {wanted}"
        if config.out_channels == 2 * (config.in_channels - concat_channels) and not self.learns_variance:
            hint += "; a network with a learned variance needs variance_type='learned_range'"
        return hint

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output into prediction and variance (None if fixed), each with the channels of `like`.

        Raises:
            ValueError: an output with other channels.
        """
        wanted = self.channels(like.shape[1])["out_channels"]
        if output.shape[1] != wanted:
            raise ValueError(
                f"the network's output has {output.shape[1]} channels; variance_type={self.variance_type!r} needs "
                f"{wanted} for data of {like.shape[1]}"
            )
        if not self.learns_variance:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `scheduler_config.json`, which `diffusers` reads too."""
        return json.loads(self.scheduler.to_json_string())

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], **changes: Any) -> Self:
        """Read the contents of `scheduler_config.json` of any `diffusers` scheduler that has betas, or of a path.

        Args:
            changes: options of `DiffusionConfig` that differ from the file; another `path` brings its own defaults.

        Raises:
            ValueError: a scheduler, schedule or prediction type that is not held, or a key that no scheduler has.
        """
        self = cls.__new__(cls)
        self._configure(change_options(read_options(config), changes))
        return self

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The options of `SamplingConfig` that a distilled network was made for; empty for other networks."""
        return {} if self.distillation is None else self.distillation.sampling

    def distilled(self, config: DistillationConfig) -> Self:
        """Return this process for a network that is distilled from one of it, with the default spacing of its path."""
        spacing = config.timestep_spacing or ("trailing" if self.path == "edm" else "quadratic")
        return self.from_dict(self.to_dict() | {"distillation": asdict(config) | {"timestep_spacing": spacing}})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json` atomically."""
        write_json(local_path(save_directory) / SCHEDULER_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `scheduler_config.json`; FileNotFoundError or ValueError if it is missing or unreadable."""
        return cls.from_dict(read_json(local_path(directory) / SCHEDULER_NAME))


def accepts_concat(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a network so that it also takes `concat` (B, C2, ...), channels that are put after those of x.

    Training and sampling both call the network through it. `drop["concat"]` (B,) zeroes the channels of the samples
    that go without (Brooks et al. 2023, InstructPix2Pix, section 3.2.1).
    """

    def call(x: Tensor, t: Tensor, *, concat: Tensor | None = None, **inputs: Any) -> Tensor:
        if concat is None:
            return model(x, t, **inputs)
        if (drop := inputs.pop("drop", None)) is not None:
            others = {name: mask for name, mask in drop.items() if name != "concat"}
            inputs |= {"drop": others} if others else {}
            if "concat" in drop:
                concat = torch.where(append_dims(drop["concat"], x.ndim), 0, concat)
        return model(torch.cat([x, concat.to(x)], dim=1), t, **inputs)

    return call
