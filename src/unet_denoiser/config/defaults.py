"""What is chosen where nothing is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from unet_denoiser.config.unet import UNetConfig


def architecture_for(
    channels: int,
    image_size: Sequence[int],
    num_classes: int | None,
    options: dict[str, Any],
    base: UNetConfig | None = None,
    network_channels: Mapping[str, int] | None = None,
    on_cpu: bool = False,
) -> UNetConfig:
    """The network to train on a data set: what was asked for, and a choice by size for the rest.

    Args:
        channels, image_size, num_classes, concat_channels: the data's.
        options: fields of `UNetConfig` that were chosen; they win.
        base: what the rest comes from, instead of the choice by size: a preset, or a checkpoint's.
        network_channels: `in_channels` and `out_channels`, where they are not the data's (see `Diffusion.channels`).
        on_cpu: choose a network that learns something in the time one has on a CPU.
    """
    data = {
        **(network_channels or {"in_channels": channels, "out_channels": channels}),
        "image_size": image_size[0] if len(set(image_size)) == 1 else tuple(image_size),
        "dims": len(image_size),
        "num_classes": num_classes,
    }
    rest = _by_size(max(image_size), options, on_cpu) if base is None else base.to_dict() | {"context_dim": None}
    if "head_dim" in options and "num_heads" not in options:
        options = {"num_heads": None, **options}
    if options.get("num_heads") is not None and "head_dim" not in options:
        options = {"head_dim": None, **options}
    return UNetConfig.from_dict(rest | data | options)


def _by_size(size: int, options: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Levels down to about 4 pixels, and attention where there are at most 16 per axis."""
    widths = {8: (32, (1, 2)), 16: (64, (1, 2, 2)), 32: (64, (1, 2, 2, 2)), 64: (96, (1, 2, 3, 4))}
    model_channels, mults = next((v for limit, v in widths.items() if size <= limit), (128, (1, 1, 2, 3, 4)))
    small = on_cpu and size > 8  # in the same time a wider one gets too few steps (docs/results/quality.md)
    model_channels = 32 if small else model_channels
    levels = len(options.get("channel_mult", mults))
    width = options.get("model_channels", model_channels)
    return {
        "model_channels": model_channels,
        "channel_mult": mults,
        "num_res_blocks": 1 if small else 2,
        "attention_resolutions": tuple(r for r in (-(-size // 2**level) for level in range(levels)) if r <= 16),
        "num_heads": None,
        "head_dim": math.gcd(width, 32),
        "context_dim": None,
        "upsample": "nearest",
        "norm_groups": max(1, min(32, width // 4)),  # with one channel per group, the time embedding would be lost
        "dropout": 0.0,  # it costs time and, until the data are learned by heart, distance; see docs/results/quality.md
    }


def default_learning_rate(model_channels: int) -> float:
    """What suits a network of this width: Adam's best rate falls as the inverse of the width (Yang et al. 2022).

    1e-3 at 32 channels is measured (docs/results/quality.md); DDPM's 2e-4 at 128 and Stable Diffusion's 1e-4 at
    320 are near.
    """
    return 0.032 / model_channels
