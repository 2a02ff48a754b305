"""How a network is trained, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from unet_denoiser.config.base import DeviceName, LossWeightingName, MixedPrecision, TrackerName, check_choice


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


# what a resumed training may be told anew, as it does not change what is learned, but for steps and precision
_SPEED = ("gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "num_workers", "device")
_SAVING = ("checkpoint_every", "keep_last", "keep_every", "keep_best", "preview_every", "track")
TRAINING_CHANGEABLE = frozenset(["steps", "max_bad_steps", *_SPEED, *_SAVING])
