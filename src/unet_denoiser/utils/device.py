"""The device to run on."""

from __future__ import annotations

import torch

from unet_denoiser.config.base import DeviceName


def resolve_device(name: DeviceName) -> str:
    """Return `name`, and for "auto" the first available of "cuda", "mps" and "cpu"; ValueError if not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, is_here in available.items() if is_here)
    if not available[name]:
        raise ValueError(f"device={name!r} is not available here; give 'auto' or 'cpu'")
    return name
