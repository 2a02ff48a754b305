"""The options of training."""

import math
import re
from dataclasses import dataclass

from unet_denoiser.config import base


@dataclass(frozen=True)
class TrainingConfig:
    """The training of a network: optimizer, loss, precision, checkpoints.

    Args:
        steps: optimizer steps in total, including those before a resume.
        batch_size: images per optimizer step, over all processes and micro-batches.
        gradient_accumulation_steps: micro-batches that each batch is split into, to save memory; the number does not
            change the training.
        learning_rate: peak learning rate of AdamW, after the warm-up (default: 0.032 / model_channels, so 1e-3 for a
            network 32 channels wide and 1e-4 for Stable Diffusion's 320).
        warmup_steps: steps over which the learning rate rises from zero; after them it falls to zero along a cosine.
        weight_decay: weight decay of AdamW.
        max_grad_norm: gradients with a larger norm are scaled down to it.
        loss_weighting: weights of the noise levels: "constant" (the squared error of the network's output), "min_snr"
            (Hang et al. 2023), "p2" (Choi et al. 2022), "truncated_snr" (Salimans and Ho 2022; not with "epsilon") or
            "learned" (each noise level's loss divided by its learned size; Karras et al. 2024).
        min_snr_gamma: gamma of "min_snr": up to this signal-to-noise ratio all noise levels weight the error of the
            noise alike, above it the error of x0.
        p2_gamma: gamma of "p2": larger values give the almost clean noise levels less weight.
        noise_offset: standard deviation of an offset per sample and channel that is added to the noise, so that very
            dark and very bright images are learned; 0.05 to 0.1 is usual, 0 is off (Guttenberg 2023).
        ema_decay: decay of the averaged weights (EMA), which are saved and sampled from.
        condition_dropout: probability of dropping a sample's conditions, which classifier-free guidance needs.
        seed: seed of weights, data order, noise and previews.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        mixed_precision: "bf16" or "fp16" (GPUs only) for convolutions and matrix products; weights, norms, softmax,
            embeddings and loss stay in float32 (default: "bf16" on a GPU that computes in it, else "no").
        compile: run the network's blocks through torch.compile, which shares code among blocks of the same shape; the
            first step takes a minute or more.
        max_bad_steps: a step whose loss or gradients are not finite is skipped; after this many in a row, training
            stops and reports where they come from.
        lora_rank: train a LoRA of this rank on the attention projections instead of all weights; needs --init.
        checkpoint_every: steps between checkpoints, or the longest time, as in 90s, 10m or 1h; the first and the last
            step always write one.
        keep_last: number of latest checkpoints to keep.
        keep_every: also write and keep checkpoints at multiples of this number of steps.
        keep_best: also keep the checkpoint with the lowest training loss, averaged over about the last 1000 steps.
        preview_every: steps between previews (pictures of samples), or the longest time, as in 10m; the first then
            comes after a minute. The last step always makes one.
        num_workers: processes that load data (default: none for data in memory, else up to 4).
        device: "auto" uses a GPU if there is one.
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
    loss_weighting: base.LossWeightingName = "constant"
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    noise_offset: float = 0.0
    ema_decay: float = 0.999
    condition_dropout: float = 0.1
    seed: int = 0
    gradient_checkpointing: bool = False
    mixed_precision: base.MixedPrecision | None = None
    compile: bool = False
    max_bad_steps: int = 20
    lora_rank: int | None = None
    checkpoint_every: int | str = "10m"
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False
    preview_every: int | str = "10m"
    num_workers: int | None = None
    device: base.DeviceName = "auto"
    track: base.TrackerName | None = None

    def __post_init__(self) -> None:
        base.check_types(self)
        if self.num_workers is not None and self.num_workers > 1024:
            raise ValueError(f"num_workers={self.num_workers} must be at most 1024: each is a process")
        base.check_minimum(self, 1, "steps", "batch_size", "gradient_accumulation_steps", "max_bad_steps", "keep_last")
        base.check_minimum(self, 1, "keep_every", "lora_rank")
        for name in ("checkpoint_every", "preview_every"):
            _check_interval(name, getattr(self, name))
        base.check_minimum(self, 0, "num_workers")
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


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as "90s", "10m" or "1h"; ValueError if it is none, or zero."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or (seconds := float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]) <= 0:
        raise ValueError(f"{text!r} is no time; give one as in 90s, 10m or 1h")
    return seconds


def _check_interval(name: str, value: int | str) -> None:
    """Raise ValueError unless a value is a number of steps from 1, or a duration."""
    try:
        valid = parse_duration(value) > 0 if isinstance(value, str) else isinstance(value, int) and value >= 1
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{name}={value} must be a number of steps, at least 1, or a time as in 90s, 10m or 1h")


# options that `--resume` may change: none but steps, mixed_precision and compile changes what is learned
_SPEED = (
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "mixed_precision",
    "compile",
    "num_workers",
    "device",
)
_SAVING = ("checkpoint_every", "keep_last", "keep_every", "keep_best", "preview_every", "track")
TRAINING_CHANGEABLE = frozenset(["steps", "max_bad_steps", *_SPEED, *_SAVING])
