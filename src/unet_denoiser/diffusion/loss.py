"""The training loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def draw_noise(x0: Tensor, offset: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """Noise for x0 (B, C, ...): N(0, 1), and `offset` times one more draw for each sample and channel.

    The offset is what makes very dark and very bright images possible (Guttenberg 2023, "Diffusion with offset noise").
    """
    kind: dict[str, Any] = {"dtype": x0.dtype, "device": x0.device, "generator": generator}
    noise = torch.randn(x0.shape, **kind)
    return noise + offset * torch.randn(*x0.shape[:2], *[1] * (x0.ndim - 2), **kind) if offset else noise


class Losses(NamedTuple):
    """A batch's losses, one value per sample, (B,) each in float32.

    Args:
        loss: what is minimised.
        error: the mean squared error of what the network predicts, without any weight; this is what tells how well
            it does at a noise level, whatever the weights and whatever else is minimised.
        t: the timesteps, integers.
    """

    loss: Tensor
    error: Tensor
    t: Tensor
