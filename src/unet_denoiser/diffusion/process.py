"""The diffusion process: noise schedule, prediction type and data range, in one object saved as one file.

Training and sampling both take it, so they cannot disagree. It is variance preserving, as DDPM:
x_t = alpha_t x0 + sigma_t eps with alpha_t^2 = product of (1 - beta) and sigma_t^2 = 1 - alpha_t^2.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from unet_denoiser.config.base import PredictionType, VarianceType, signature_of
from unet_denoiser.config.diffusion import DiffusionConfig
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.diffusion.vlb import VariationalBound
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.files import read_json, write_json

SCHEDULER_NAME = "scheduler_config.json"


class Diffusion:
    """A forward process and the quantity that a network learns of it, kept as a `diffusers` scheduler's configuration.

    It takes the arguments of `DiffusionConfig`.

    Attributes:
        num_train_timesteps: T; timesteps are 0 to T - 1.
        alphas, sigmas, snr: (T,) of every timestep; snr is the signal-to-noise ratio alpha^2 / sigma^2.
        learns_variance: True if the second half of the network's output is a variance.
        data_range: bounds of the data, to which predicted x0 are clipped; None for unbounded data.
        distillation: the steps of a distilled network; None for a network that predicts as the prediction type says.

    Raises:
        ValueError: an option that cannot work.
    """

    @signature_of(DiffusionConfig)
    def __init__(self, **options: Any) -> None:
        config = asdict(DiffusionConfig(**options))
        clip = config["clip_sample_range"]
        config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0, "timestep_spacing": "trailing"}
        self._configure(config)

    def _configure(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        self.self_conditioning: bool = config.pop("self_conditioning", False)
        distilled = config.pop("distillation", None)
        self.distillation = None if distilled is None else DistillationConfig(**distilled)
        self.scheduler = DDPMScheduler.from_config(config)
        if self.distillation is not None:
            self.scheduler.register_to_config(distillation=asdict(self.distillation))
        if self.self_conditioning:  # an option that diffusers does not have, but keeps in the file
            self.scheduler.register_to_config(self_conditioning=True)
        self.prediction_type: PredictionType = self.scheduler.config.prediction_type
        self.variance_type: VarianceType = self.scheduler.config.variance_type
        self.prediction = PREDICTIONS[self.prediction_type]
        self.alphas: Tensor = self.scheduler.alphas_cumprod.sqrt()
        self.sigmas: Tensor = (1 - self.scheduler.alphas_cumprod).sqrt()
        self.snr = (self.alphas / self.sigmas).square()
        self.num_train_timesteps, self.learns_variance = len(self.alphas), self.variance_type == "learned_range"
        r = self.scheduler.config.clip_sample_range
        self.data_range: tuple[float, float] | None = (-r, r) if self.scheduler.config.clip_sample else None
        self.bound = VariationalBound(self.scheduler.betas)
        self._tables: dict[torch.device, Tensor] = {}

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t of integer timesteps t (B,), shaped to multiply with `like` (B, ...)."""
        if t.device not in self._tables:  # moved once: torch waits for each copy to a GPU
            self._tables[t.device] = torch.stack([self.alphas, self.sigmas]).to(t.device)
        alpha, sigma = self._tables[t.device][:, t].to(like.dtype)  # (B,) each
        return append_dims(alpha, like.ndim), append_dims(sigma, like.ndim)

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
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the contents of `scheduler_config.json` of any `diffusers` scheduler of the DDPM family.

        Raises:
            ValueError: a scheduler, schedule or prediction type outside that family, or a key that no scheduler has.
        """
        predicts = "sample" if config.get("predict_epsilon") is False else "epsilon"  # the option's name at first
        config = _scheduler_defaults(config) | {"prediction_type": predicts} | dict(config)
        # the same variance by another computation; other samplers' files have none
        names = {"fixed_small_log": "fixed_small", None: "fixed_small"}
        config["variance_type"] = names.get(config.get("variance_type"), config.get("variance_type"))
        DiffusionConfig(**{field.name: config[field.name] for field in fields(DiffusionConfig) if field.name in config})
        self = cls.__new__(cls)
        self._configure(config)
        return self

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The options of `SamplingConfig` that a distilled network was made for; empty for other networks."""
        return {} if self.distillation is None else self.distillation.sampling

    def distilled(self, config: DistillationConfig) -> Self:
        """Return this process for a network that is distilled from one of it."""
        return self.from_dict(self.to_dict() | {"distillation": asdict(config)})

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `scheduler_config.json` atomically."""
        write_json(local_path(save_directory) / SCHEDULER_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """Read `scheduler_config.json`; FileNotFoundError or ValueError if it is missing or unreadable."""
        return cls.from_dict(read_json(local_path(directory) / SCHEDULER_NAME))


def _scheduler_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the scheduler that wrote a configuration.

    ValueError for a scheduler without betas or with shifted ones, and for a key that no scheduler has: its value would
    be lost.
    """
    name, keys = config.get("_class_name", "DDPMScheduler"), {key for key in config if not key.startswith("_")}
    keys -= {"self_conditioning", "distillation"}  # ours
    keys -= {"predict_epsilon", "tensor_format"}  # names of diffusers' first versions
    parameters = signature(getattr(diffusers, str(name), DDPMScheduler)).parameters
    if not {"beta_schedule", "kwargs"} & set(parameters) or "snr_shift_scale" in parameters:
        raise ValueError(f"_class_name={name!r} is no scheduler of DDPM's family, whose noise levels come from betas")
    if keys - set(parameters):  # only then, since looking at all schedulers takes a second
        every = (getattr(diffusers, other) for other in dir(diffusers) if other.endswith("Scheduler"))
        if unknown := sorted(keys.difference(*(signature(scheduler).parameters for scheduler in every))):
            raise ValueError(f"{unknown[0]}={config[unknown[0]]!r} is an option of no scheduler; correct its name")
    if config.get("thresholding"):
        raise ValueError("thresholding=True, which cuts off a share of the values of x0, has no counterpart here")
    names = {"beta_start", "beta_end", "beta_schedule", "clip_sample"} & set(parameters)
    return {"clip_sample": False} | {key: parameters[key].default for key in names}


def self_conditioned_input(xt: Tensor, x0_estimate: Tensor | None) -> Tensor:
    """Return the network's input: x_t, followed by an estimate of x0 with self-conditioning (Chen et al. 2022)."""
    return xt if x0_estimate is None else torch.cat([xt, x0_estimate], dim=1)


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
