"""How a network is trained and sampled, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
SamplerName = Literal["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]


def check_choice(name: str, value: object, choices: object) -> None:
    """ValueError naming the field, the value and the valid ones, unless `value` is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")


@dataclass(frozen=True)
class DiffusionConfig:
    """A forward process, and what a network learns of it.

    Args:
        num_train_timesteps: T; timesteps are 0 (almost clean) to T - 1 (almost noise).
        beta_schedule: "linear" (DDPM), "scaled_linear" (Stable Diffusion), "squaredcos_cap_v2" (cosine) or "sigmoid".
        beta_start: the first beta; the cosine schedule has none.
        beta_end: the last beta.
        prediction_type: what the network outputs: "epsilon" (the noise; Ho et al. 2020), "v_prediction"
            (alpha eps - sigma x0; Salimans and Ho 2022) or "sample" (x0).
        clip_sample_range: r, when the data lie in [-r, r] and predicted x0 are clipped to it; None for unbounded data
            (latents).
        rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023); not with "epsilon", which tells
            nothing of x0 there.

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: PredictionType = "epsilon"
    clip_sample_range: float | None = 1.0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BetaSchedule)
        check_choice("prediction_type", self.prediction_type, PredictionType)
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1, for example 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must be 0 < start <= end < 1")
        if self.clip_sample_range is not None and not self.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range={self.clip_sample_range} must be positive, or None for unbounded data")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' with rescale_betas_zero_snr=True: predicted noise tells nothing of x0 at "
                "the last timestep; use 'v_prediction' or 'sample'"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: optimizer steps in all, resumed ones included.
        batch_size: images per step, over all processes together.
        learning_rate: of AdamW, after the warm-up.
        warmup_steps: steps over which the learning rate rises from zero; it falls to zero along a cosine after them.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        ema_decay: decay of the averaged weights, which are the ones that are saved and sampled from.
        condition_dropout: share of samples whose conditions are dropped, so that guidance works.
        seed: of weights, data order, noise and previews.
        gradient_checkpointing: less memory for more time.
        checkpoint_every: steps between checkpoints; the last step always makes one.
        preview_every: steps between pictures of samples; the last step always makes one.
        num_workers: processes that load data (default: none for data in memory, else up to 4).
        device: "auto" takes a GPU where there is one.

    Raises:
        ValueError, TypeError: an option that cannot work, with its name, its value and a valid one.
    """

    steps: int = 20_000
    batch_size: int = 64
    learning_rate: float = 3e-4
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    condition_dropout: float = 0.1
    seed: int = 0
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1000
    preview_every: int = 1000
    num_workers: int | None = None
    device: DeviceName = "auto"

    def __post_init__(self) -> None:
        check_choice("device", self.device, DeviceName)
        for name in ("steps", "batch_size", "checkpoint_every", "preview_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0")
