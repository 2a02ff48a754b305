"""Architectures by name, as data, and the one that is chosen for a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unet_denoiser.config import UNetConfig

PRESETS: dict[str, dict[str, Any]] = {
    # the specification's network: the defaults
    "specification": {},
    # Ho et al. 2020, CIFAR-10: 35,746,307 parameters
    "ddpm-cifar10": {
        "channel_mult": (1, 2, 2, 2),
        "attention_resolutions": (16,),
        "num_heads": 1,
        "context_dim": None,
        "image_size": 32,
        "downsample": "conv_asymmetric",
        "upsample": "nearest",
        "norm_eps": 1e-6,
    },
}


def list_presets() -> list[str]:
    """The names that `preset` knows."""
    return list(PRESETS)


def preset(name: str) -> UNetConfig:
    """The architecture of a name; ValueError with the valid ones for any other."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is not one of {', '.join(PRESETS)}")
    return UNetConfig(**PRESETS[name])


def architecture_for(
    channels: int, image_size: Sequence[int], num_classes: int | None, options: dict[str, Any], base: str | None = None
) -> UNetConfig:
    """The network to train on a data set: what was asked for, and a choice by size for the rest.

    Args:
        channels, image_size, num_classes: the data's.
        options: fields of `UNetConfig` that were chosen; they win.
        base: a preset that the rest comes from, instead of the choice by size.
    """
    data = {
        "in_channels": channels,
        "out_channels": channels,
        "image_size": image_size[0] if len(set(image_size)) == 1 else tuple(image_size),
        "dims": len(image_size),
        "num_classes": num_classes,
    }
    rest = _by_size(max(image_size), options) if base is None else preset(base).to_dict() | {"context_dim": None}
    if "head_dim" in options and "num_heads" not in options:
        options = {"num_heads": None, **options}
    return UNetConfig.from_dict(rest | data | options)


def _by_size(size: int, options: dict[str, Any]) -> dict[str, Any]:
    """Levels down to about 4 pixels, and attention where there are at most 16 per axis."""
    widths = {8: (32, (1, 2)), 16: (64, (1, 2, 2)), 32: (64, (1, 2, 2, 2)), 64: (96, (1, 2, 3, 4))}
    model_channels, mults = next((v for limit, v in widths.items() if size <= limit), (128, (1, 1, 2, 3, 4)))
    levels = len(options.get("channel_mult", mults))
    width = options.get("model_channels", model_channels)
    return {
        "model_channels": model_channels,
        "channel_mult": mults,
        "attention_resolutions": tuple(r for r in (-(-size // 2**level) for level in range(levels)) if r <= 16),
        "num_heads": None,
        "head_dim": math.gcd(width, 32),
        "context_dim": None,
        "upsample": "nearest",
        "norm_groups": max(1, min(32, width // 4)),  # with one channel per group, the time embedding would be lost
    }
