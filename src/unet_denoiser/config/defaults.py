"""Defaults that depend on dataset and device: the architecture, the learning rate, the number of steps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unet_denoiser.config.base import halve
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig

# image size up to which a row applies: (model_channels, channel_mult)
_WIDTHS = {8: (32, (1, 2)), 16: (64, (1, 2, 2)), 32: (64, (1, 2, 2, 2)), 64: (96, (1, 2, 3, 4))}
_LARGEST_WIDTHS = (128, (1, 1, 2, 3, 4))
CPU_SECONDS = 3300  # of steps in a default training on a CPU; with previews and checkpoints that is within an hour
MAX_PASSES, FEWEST_STEPS = 500, 2000  # over more passes through the data a network learns them by heart


def architecture_for(
    channels: int,
    image_size: Sequence[int],
    num_classes: int | None,
    options: dict[str, Any],
    *,
    base: UNetConfig | None = None,
    network_channels: Mapping[str, int] | None = None,
    on_cpu: bool = False,
) -> UNetConfig:
    """Return the architecture of a network to train on a dataset.

    Args:
        channels, image_size, num_classes: of the dataset.
        options: fields of `UNetConfig` that the user chose; they win.
        base: a preset or a checkpoint's architecture for the other fields, instead of defaults by image size.
        network_channels: `in_channels` and `out_channels`, if they differ from `channels` (see `Diffusion.channels`).
        on_cpu: choose a network that is small enough to train on a CPU.
    """
    data = {
        **(network_channels or {"in_channels": channels, "out_channels": channels}),
        "image_size": image_size[0] if len(set(image_size)) == 1 else tuple(image_size),
        "dims": len(image_size),
        "num_classes": num_classes,
    }
    rest = _defaults_for(max(image_size), options, on_cpu) if base is None else base.to_dict() | {"context_dim": None}
    if "head_dim" in options and "num_heads" not in options:
        options = {"num_heads": None, **options}
    if options.get("num_heads") is not None and "head_dim" not in options:
        options = {"head_dim": None, **options}
    return UNetConfig.from_dict(rest | data | options)


def _defaults_for(size: int, options: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Choose levels down to about 4 pixels, with attention where an axis has at most 16."""
    model_channels, mults = next((row for limit, row in _WIDTHS.items() if size <= limit), _LARGEST_WIDTHS)
    small = on_cpu and size > 8  # a wider one takes too few steps in the same time (docs/results/quality.md)
    model_channels = 32 if small else model_channels
    levels = len(options.get("channel_mult", mults))
    width = options.get("model_channels", model_channels)
    return {
        "model_channels": model_channels,
        "channel_mult": mults,
        "num_res_blocks": 1 if small else 2,
        "attention_resolutions": tuple(r for r in (halve(size, level) for level in range(levels)) if r <= 16),
        "num_heads": None,
        "head_dim": math.gcd(width, 32),
        "context_dim": None,
        "upsample": "nearest",
        "norm_groups": max(1, min(32, width // 4)),  # one channel per group would cancel the time embedding
        "dropout": 0.0,  # it costs time and, before overfitting begins, quality (docs/results/quality.md)
    }


def default_learning_rate(model_channels: int) -> float:
    """Return AdamW's learning rate for a width: the best rate is proportional to 1 / width (Yang et al. 2022).

    1e-3 at 32 channels is measured (docs/results/quality.md); the rule comes near DDPM's 2e-4 at 128 and Stable
    Diffusion's 1e-4 at 320.
    """
    return 0.032 / model_channels


def default_steps(num_images: int | None, batch_size: int, seconds_per_step: float | None = None) -> int:
    """Return the number of optimizer steps of a training whose length nobody chose.

    It is that of `TrainingConfig`, less for little data and on a CPU, and has two digits that are not 0.

    Args:
        num_images: of the dataset; None for a stream.
        seconds_per_step: on a CPU; None where time is no limit.
    """
    steps = TrainingConfig.steps
    if num_images is not None:
        steps = min(steps, max(FEWEST_STEPS, MAX_PASSES * num_images // batch_size))
    if seconds_per_step is not None:
        steps = min(steps, max(1, int(CPU_SECONDS / seconds_per_step)))
    digit = 10 ** max(0, len(str(steps)) - 2)
    return steps // digit * digit
