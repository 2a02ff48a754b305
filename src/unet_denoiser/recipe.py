"""How a network is trained, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
LossWeightingName = Literal["constant", "min_snr", "p2", "truncated_snr", "learned"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb"]
ForeignFormat = Literal["diffusers", "ldm", "adm", "ddpm"]
CheckpointFormat = Literal["unet-denoiser", "pipeline", ForeignFormat]
QKVOrder = Literal["legacy", "new"]


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
        variance_type: the variance of a step of the ddpm sampler: "fixed_small" (the posterior's), "fixed_large" (beta)
            or "learned_range": the network predicts it in a second half of its output channels (Nichol and Dhariwal
            2021).
        self_conditioning: the network sees its previous estimate of x0 too, in further input channels (Chen et al.
            2022).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    num_train_timesteps: int = 1000
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    prediction_type: PredictionType = "v_prediction"
    clip_sample_range: float | None = 1.0
    rescale_betas_zero_snr: bool = False
    variance_type: VarianceType = "fixed_small"
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BetaSchedule)
        check_choice("prediction_type", self.prediction_type, PredictionType)
        check_choice("variance_type", self.variance_type, VarianceType)
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1, for example 1000")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must be 0 < start <= end < 1")
        if self.clip_sample_range is not None and not 0 < self.clip_sample_range < math.inf:
            raise ValueError(
                f"clip_sample_range={self.clip_sample_range} must be positive and finite, or None for unbounded data"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' with rescale_betas_zero_snr=True: predicted noise tells nothing of x0 at "
                "the last timestep; use 'v_prediction' or 'sample'"
            )
        if self.variance_type == "learned_range" and self.num_train_timesteps < 2:
            raise ValueError(
                "variance_type='learned_range' with num_train_timesteps=1: there is no range; use 'fixed_small'"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained.

    Args:
        steps: optimizer steps in all, resumed ones included.
        batch_size: images per optimizer step, over all processes and accumulated parts together.
        gradient_accumulation_steps: parts that a batch is computed in, one after the other, to save memory; their
            number does not change the training.
        learning_rate: of AdamW, after the warm-up (default: 0.032 / model_channels, so 1e-3 for a network 32 channels
            wide and 1e-4 for Stable Diffusion's 320).
        warmup_steps: steps over which the learning rate rises from zero; it falls to zero along a cosine after them.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm.
        loss_weighting: of the noise levels: "constant" (that of the squared error of the network's output), "min_snr"
            (Hang et al. 2023), "p2" (Choi et al. 2022), "truncated_snr" (Salimans and Ho 2022; not with "epsilon") or
            "learned" (each level's loss divided by its own size; Karras et al. 2024).
        min_snr_gamma: gamma of "min_snr": up to this signal-to-noise ratio the error of the noise counts alike at all
            levels, above it that of x0.
        p2_gamma: gamma of "p2": how much less the almost clean levels count.
        noise_offset: size of a draw that all pixels of a channel share, added to the noise, so that very dark and very
            bright images are learned; 0.05 to 0.1 is usual, 0 is off (Guttenberg 2023).
        ema_decay: decay of the averaged weights, which are the ones that are saved and sampled from.
        condition_dropout: share of samples whose conditions are dropped, so that guidance works.
        seed: of weights, data order, noise and previews.
        gradient_checkpointing: less memory for more time.
        mixed_precision: "bf16" or "fp16" (GPUs only) for convolutions and matrix products; weights, norms, softmax,
            embeddings and loss stay in float32.
        max_bad_steps: a step whose loss or gradients are not finite changes nothing; after this many in a row
            training stops and says where they come from.
        lora_rank: train a LoRA of this rank on the attention's projections instead of all weights; with --init.
        checkpoint_every: steps between checkpoints; the first and the last step always make one.
        keep_last: how many of the latest checkpoints are kept.
        keep_every: also keep those of every so many steps.
        keep_best: also keep the one with the lowest training loss, averaged over about the last 1000 steps.
        preview_every: steps between pictures of samples; the last step always makes one.
        num_workers: processes that load data (default: none for data in memory, else up to 4).
        device: "auto" takes a GPU where there is one.
        track: also log to "tensorboard" or "wandb".

    Raises:
        ValueError, TypeError: an option that cannot work, with its name, its value and a valid one.
    """

    steps: int = 20_000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss_weighting: LossWeightingName = "constant"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    noise_offset: float = 0.0
    ema_decay: float = 0.999
    condition_dropout: float = 0.1
    seed: int = 0
    gradient_checkpointing: bool = False
    mixed_precision: MixedPrecision = "no"
    max_bad_steps: int = 20
    lora_rank: int | None = None
    checkpoint_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    preview_every: int = 1000
    num_workers: int | None = None
    device: DeviceName = "auto"
    track: TrackerName | None = None

    def __post_init__(self) -> None:
        check_choice("device", self.device, DeviceName)
        check_choice("loss_weighting", self.loss_weighting, LossWeightingName)
        check_choice("mixed_precision", self.mixed_precision, MixedPrecision)
        if self.track is not None:
            check_choice("track", self.track, TrackerName)
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "max_bad_steps", "keep_last")
        for name in (*counts, "checkpoint_every", "preview_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_every", "lora_rank"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or None")
        if self.batch_size % self.gradient_accumulation_steps:
            parts = self.gradient_accumulation_steps
            raise ValueError(f"batch_size={self.batch_size} cannot be divided into {parts} equal parts")
        for name in ("warmup_steps", "weight_decay", "seed", "p2_gamma", "noise_offset"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must fit 63 bits")
        for name in ("learning_rate", "max_grad_norm", "min_snr_gamma"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0")


def default_learning_rate(model_channels: int) -> float:
    """What suits a network of this width: Adam's best rate falls as the inverse of the width (Yang et al. 2022).

    1e-3 at 32 channels is measured (docs/quality.md); DDPM's 2e-4 at 128 and Stable Diffusion's 1e-4 at 320 are near.
    """
    return 0.032 / model_channels


# what a resumed training may be told anew, as it does not change what is learned, but for steps and precision
_SPEED = ("gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "num_workers", "device")
_SAVING = ("checkpoint_every", "keep_last", "keep_every", "keep_best", "preview_every", "track")
TRAINING_CHANGEABLE = frozenset(["steps", "max_bad_steps", *_SPEED, *_SAVING])
