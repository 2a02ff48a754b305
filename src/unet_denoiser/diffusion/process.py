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

from unet_denoiser.config.base import PredictionType, VarianceType, signature_of
from unet_denoiser.config.diffusion import DiffusionConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.diffusion.loss import Losses, draw_noise
from unet_denoiser.diffusion.vlb import VariationalBound
from unet_denoiser.utils.files import read_json, write_atomically

SCHEDULER_NAME = "scheduler_config.json"
VLB_WEIGHT = 0.001


def self_conditioned_input(xt: Tensor, x0_estimate: Tensor | None) -> Tensor:
    """What the network sees of the process: x_t, with self-conditioning followed by an estimate of x0."""
    return xt if x0_estimate is None else torch.cat([xt, x0_estimate], dim=1)


def _rows(inputs: Any, chosen: Tensor) -> Any:
    """Some samples' share of a network's inputs, which may be tensors, None, and dicts of them."""
    if isinstance(inputs, Mapping):
        return {name: _rows(value, chosen) for name, value in inputs.items()}
    return None if inputs is None else inputs[chosen]


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
        config = dict(config)
        self.self_conditioning: bool = config.pop("self_conditioning", False)
        self.scheduler = DDPMScheduler.from_config(config)
        if self.self_conditioning:  # diffusers knows of none, and keeps it
            self.scheduler.register_to_config(self_conditioning=True)
        self.prediction_type: PredictionType = self.scheduler.config.prediction_type
        self.variance_type: VarianceType = self.scheduler.config.variance_type
        self.alphas: Tensor = self.scheduler.alphas_cumprod.sqrt()
        self.sigmas: Tensor = (1 - self.scheduler.alphas_cumprod).sqrt()
        self.bound = VariationalBound(self.scheduler.betas)
        self._tables: dict[torch.device, Tensor] = {}

    @property
    def num_train_timesteps(self) -> int:
        """T; timesteps are 0 to T - 1."""
        return len(self.alphas)

    @property
    def snr(self) -> Tensor:
        """(T,) signal-to-noise ratio alpha^2 / sigma^2 of every timestep."""
        return (self.alphas / self.sigmas).square()

    @property
    def learns_variance(self) -> bool:
        """Whether the network's output has a second half, its variance."""
        return self.variance_type == "learned_range"

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
        weighting: Callable[[Tensor, Tensor], Tensor] | None = None,
        self_condition: Tensor | None = None,
        **inputs: Any,
    ) -> Losses:
        """The squared error of the network's output (DDPM, equation 14), weighted, and the bound of a learned variance.

        The bound trains the variance alone (Nichol and Dhariwal 2021, equation 16: L_simple + 0.001 L_vlb, in the
        authors' units, T times the bits per dimension of the timestep).

        Args:
            model: called as model(input, t, **inputs), with the input that `self_conditioned_input` makes, through
                `accepts_concat`.
            x0: (B, C, ...) data.
            t, noise: drawn uniformly and from N(0, 1) unless given; `draw_noise` makes other noise.
            weighting: (error (B,), t (B,)) -> (B,) what is minimised; see `LossWeighting`.
            self_condition: (B,) bool, with self-conditioning: the samples whose network sees an estimate of x0, drawn
                with probability 1/2 unless given.

        Raises:
            ValueError: a network whose output does not have the channels that the process needs.
        """
        t = torch.randint(self.num_train_timesteps, (len(x0),), device=x0.device) if t is None else t
        noise = draw_noise(x0) if noise is None else noise
        model, xt, estimate = accepts_concat(model), self.add_noise(x0, noise, t), None
        if self.self_conditioning:
            seeing = torch.rand(len(x0), device=x0.device) < 0.5 if self_condition is None else self_condition
            estimate = self._first_estimate(model, xt, t, seeing, inputs)
        prediction, variance = self.split(model(self_conditioned_input(xt, estimate), t, **inputs).float(), x0)
        error = (prediction - self.target(x0, noise, t).float()).square().flatten(1).mean(1)
        loss = error if weighting is None else weighting(error, t)
        if variance is not None:
            predicted_x0 = self.predict_x0(prediction.detach(), xt, *self._at(t, xt), clip=False)
            bound = self.bound(x0.float(), xt.float(), t, predicted_x0, variance, self.data_range)
            loss = loss + VLB_WEIGHT * self.num_train_timesteps * bound
        return Losses(loss, error, t)

    def _first_estimate(
        self, model: Callable[..., Tensor], xt: Tensor, t: Tensor, seeing: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The x0 that the network predicts without an estimate, for the samples that shall see one; zero for others."""
        chosen = seeing.nonzero()[:, 0]
        if not len(chosen):  # the processes of a sharded training must all run the network equally often
            chosen = torch.zeros(1, dtype=torch.long, device=xt.device)
        some_xt, some_t = xt[chosen], t[chosen]
        with torch.no_grad():
            output = model(self_conditioned_input(some_xt, torch.zeros_like(some_xt)), some_t, **_rows(inputs, chosen))
            x0 = self.predict_x0(self.split(output.float(), some_xt)[0], some_xt, *self._at(some_t, some_xt))
        estimate = torch.zeros_like(xt).index_copy(0, chosen, x0.to(xt))
        return torch.where(seeing.view(-1, *[1] * (xt.ndim - 1)), estimate, 0)

    def _at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped to multiply with `like`."""
        if t.device not in self._tables:  # moved once: torch waits for each copy to a GPU
            self._tables[t.device] = torch.stack([self.alphas, self.sigmas]).to(t.device)
        alpha, sigma = self._tables[t.device][:, t].view(2, -1, *[1] * (like.ndim - 1)).to(like.dtype)
        return alpha, sigma

    # ---- what goes into the network and comes out ------------------------------------------------------------------

    def channels(self, data_channels: int, concat_channels: int = 0) -> dict[str, int]:
        """`in_channels` and `out_channels` of a network for this process, data and concatenated channels."""
        own_input = data_channels * (2 if self.self_conditioning else 1)
        own_output = data_channels * (2 if self.learns_variance else 1)
        return {"in_channels": own_input + concat_channels, "out_channels": own_output}

    def check_channels(self, config: UNetConfig, data_channels: int | None = None, concat_channels: int = 0) -> int:
        """The channels of the data of a network for this process.

        Args:
            data_channels: what they must be; from `out_channels` unless given.

        Raises:
            ValueError: a network with other channels, such as one with a learned variance for a process without.
        """
        count = data_channels or config.out_channels // (2 if self.learns_variance else 1)
        for name, wanted in self.channels(count, concat_channels).items():
            if (found := getattr(config, name)) != wanted:
                data = f"the data have {count} channels" if data_channels else f"the samples have {count} channels"
                raise ValueError(f"{name}={found}, but {data}{self._reason(config, wanted, concat_channels)}")
        return count

    def _reason(self, config: UNetConfig, wanted: int, concat_channels: int) -> str:
        """What asks for other channels than the data's, or which options would suit the network."""
        options = f"variance_type={self.variance_type!r} and self_conditioning={self.self_conditioning}"
        options += f" and {concat_channels} channels of concat" if concat_channels else ""
        reason = f"; with {options} it must be {wanted}"
        twice = config.out_channels == 2 * (config.in_channels - concat_channels)
        if twice and not self.learns_variance:
            reason += "; a network with a learned variance needs variance_type='learned_range'"
        return reason

    def split(self, output: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's output as prediction and variance, each with the channels of `like`; None for a fixed variance.

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

    def predict_x0(self, output: Tensor, xt: Tensor, alpha: Tensor, sigma: Tensor, clip: bool = True) -> Tensor:
        """The clean data that an output of the network at x_t stands for, clipped to the data's range."""
        if self.prediction_type == "epsilon":
            x0 = (xt - sigma * output) / alpha
        elif self.prediction_type == "sample":
            x0 = output
        else:
            x0 = alpha * xt - sigma * output
        return self.clip(x0) if clip else x0

    def clip(self, x0: Tensor) -> Tensor:
        """x0 within the data's range, where it has one."""
        return x0.clamp(*self.data_range) if self.data_range else x0

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
        config = {"prediction_type": "epsilon", "beta_schedule": "linear"} | dict(config)  # diffusers' defaults
        # the same variance by another computation; other samplers' files have none
        names = {"fixed_small_log": "fixed_small", None: "fixed_small"}
        config["variance_type"] = names.get(config.get("variance_type"), config.get("variance_type"))
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


def accepts_concat(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The network as a function that also takes `concat`, channels that are put after those of x.

    Training and sampling both call the network through it. `drop["concat"]` (B,) puts zeros where a sample goes
    without (Brooks et al. 2023, InstructPix2Pix, section 3.2.1).

    Args:
        model: called as model(x, t, **inputs).
    """

    def call(x: Tensor, t: Tensor, *, concat: Tensor | None = None, **inputs: Any) -> Tensor:
        if concat is None:
            return model(x, t, **inputs)
        if (drop := inputs.pop("drop", None)) is not None:
            others = {name: mask for name, mask in drop.items() if name != "concat"}
            inputs |= {"drop": others} if others else {}
            if "concat" in drop:
                concat = torch.where(drop["concat"].view(-1, *[1] * (x.ndim - 1)), 0, concat)
        return model(torch.cat([x, concat.to(x)], dim=1), t, **inputs)

    return call


def data_channels(config: UNetConfig, process: Diffusion) -> int:
    """The channels of a network's samples."""
    return config.out_channels // (2 if process.learns_variance else 1)


def concat_channels(config: UNetConfig, process: Diffusion) -> int:
    """The channels that a network takes beside the noisy sample."""
    return config.in_channels - process.channels(data_channels(config, process))["in_channels"]
