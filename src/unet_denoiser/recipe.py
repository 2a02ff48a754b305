"""How a network is trained, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
VarianceType = Literal["fixed_small", "fixed_large", "learned_range"]
LossWeightingName = Literal["constant", "min_snr", "p2", "truncated_snr", "learned"]
ResizeMode = Literal["center_crop", "random_crop", "pad", "stretch"]
OnBad = Literal["raise", "skip"]
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
        learning_rate: of AdamW, after the warm-up.
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
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 3e-4
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
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        for name in ("ema_decay", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must be at least 0")


# what a resumed training may be told anew, as it does not change what is learned, but for steps and precision
_SPEED = ("gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision", "num_workers", "device")
_SAVING = ("checkpoint_every", "keep_last", "keep_every", "keep_best", "preview_every", "track")
TRAINING_CHANGEABLE = frozenset(["steps", "max_bad_steps", *_SPEED, *_SAVING])


@dataclass(frozen=True)
class DataConfig:
    """What a network is trained on.

    Args:
        source: "digits"; a folder of images; an .npz or .npy of images (N, H, W[, C]), uint8, uint16 or floats in
            [-1, 1]; a .parquet file or a folder of them; or "hf:NAME" or "hf:NAME:SUBSET" for a Hugging Face data set.
        image_size: resize to this, one int or height and width (default: that of most images up to 64, else 64).
        channels: convert to this number: 1 (grey), 3 (RGB) or 4 (RGBA) for image files (default: what they have).
        class_names: names of the classes in label order (default: those found).
        split: of a Hugging Face data set.
        image_column: of Parquet and Hugging Face data sets (default: the first that holds images).
        label_column: the class, a name or an integer from 0, also in metadata.csv (default: "label" if there is one).
        caption_column: also in metadata.csv (default: "text", "caption", "captions" or "prompt" if there is one).
        vector_columns: numbers that condition the network, also in metadata.csv; taken as they are, so that values of
            about unit size are best.
        resize_mode: how images get the size: "center_crop" or "random_crop" (scaled to cover it, then cut), "pad"
            (scaled to fit into it) or "stretch".
        horizontal_flip: flip half of the images, at random.
        aspect_buckets: keep each image's aspect ratio up to 1:2, by batches of one shape each with as many pixels as
            image_size; sides are multiples of an eighth of it, at least of 8.
        background: colour that transparent images are laid on and "pad" fills with: a name or "#rrggbb".
        on_bad: what to do with files that cannot be used: "raise" names them, "skip" leaves them out.
        streaming: read Parquet or Hugging Face data sets from first to last instead of holding them on a disk.
        shuffle_buffer: images held at a time to shuffle a stream.
        cache_images: keep the decoded, scaled images in memory.
        text_encoder: folder or hub name of a transformers text encoder (CLIP's, T5's, BERT and its like); the data's
            captions then are a condition, as its tokens. They are kept on disk.
        caption_length: longest caption in tokens, longer ones are cut (default: what the tokenizer states).
        vae: folder or hub name of an AutoencoderKL or AutoencoderTiny of diffusers; the network then is trained on its
            latents, which are kept on disk, and samples are decoded.
        standardize_latents: measure mean and standard deviation of each channel of the latents and scale by them,
            instead of by what the vae's configuration states.
        latent_mean: the measured means (default: measured when needed).
        latent_std: the measured standard deviations, likewise.
        concat: a picture that the network sees beside the noisy one: "downscaled:4" (the picture at a quarter of its
            size, enlarged again: super-resolution), "inpainting" (a random mask, and the picture without what is
            masked), or a folder with a picture of the same name for each one of the data (image to image).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    source: str
    image_size: int | tuple[int, ...] | None = None
    channels: int | None = None
    class_names: tuple[str, ...] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    vector_columns: tuple[str, ...] = ()
    resize_mode: ResizeMode = "center_crop"
    horizontal_flip: bool = False
    aspect_buckets: bool = False
    background: str = "white"
    on_bad: OnBad = "raise"
    streaming: bool = False
    shuffle_buffer: int = 1000
    cache_images: bool = False
    text_encoder: str | None = None
    caption_length: int | None = None
    vae: str | None = None
    standardize_latents: bool = False
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    concat: str | None = None

    def __post_init__(self) -> None:
        check_choice("resize_mode", self.resize_mode, ResizeMode)
        check_choice("on_bad", self.on_bad, OnBad)
        if not self.source:
            raise ValueError("source='' names no data; give 'digits', a folder or a file")
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size or 1,)
        if self.image_size == 0 or not sizes or min(sizes) < 1:
            raise ValueError(f"image_size={self.image_size} must be positive")
        for name in ("channels", "shuffle_buffer"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, reason in (("aspect_buckets", "sizes are not known before"), ("cache_images", "it may not fit")):
            if self.streaming and getattr(self, name):
                raise ValueError(f"{name}=True with streaming=True: {reason}; give one of them")
        self._check_conditions()

    def _check_conditions(self) -> None:
        for name in ("text_encoder", "vae", "concat"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' names nothing; give a path, or leave it out")
        for name, needs in (("caption_length", "text_encoder"), ("standardize_latents", "vae"), ("latent_mean", "vae")):
            if getattr(self, name) and getattr(self, needs) is None:
                raise ValueError(f"{name}={getattr(self, name)} needs {needs}, which is not given")
        if self.caption_length is not None and self.caption_length < 1:
            raise ValueError(f"caption_length={self.caption_length} must be at least 1")
        if (self.latent_mean is None) != (self.latent_std is None):
            raise ValueError("latent_mean and latent_std belong together; give both, or neither")
        if self.concat is not None and self.concat.startswith("downscaled:"):
            factor = self.concat.removeprefix("downscaled:")
            if not factor.isdecimal() or int(factor) < 2:
                raise ValueError(f"concat={self.concat!r} needs a whole factor of at least 2, as in 'downscaled:4'")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> DataConfig:
        """The inverse of `dataclasses.asdict`, from JSON too; an unknown option raises ValueError."""
        if unknown := sorted(set(options) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown option of the data {unknown[0]!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return cls(**values)


# what a resumed run may change; leaving out files that broke since then changes the order of what is to come
DATA_CHANGEABLE = frozenset({"cache_images", "on_bad"})
