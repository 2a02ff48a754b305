"""Embeddings of timesteps, classes and vectors."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet_denoiser.models.layers.common import compute_dtype

Frequencies = Literal["endpoint", "half"]


class SinusoidalPosEmb(nn.Module):
    """Sinusoidal embedding of timesteps: (B,) integer or float -> (B, dim) float32, sines then cosines.

    Angles are t * 10000^(-k / (half - 1)) for k < half = dim // 2 with frequencies="endpoint" (DDPM), or
    t * 10000^(-k / half) with "half" (ADM). An odd `dim` is zero-padded on the right. (Vaswani et al. 2017, section
    3.5, where sines and cosines alternate)

    Raises:
        ValueError: dim < 2.
    """

    def __init__(self, dim: int, frequencies: Frequencies = "endpoint") -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim={dim} has no room for a sine and a cosine; give at least 2")
        self.dim = dim
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        steps = max(half - 1, 1) if self.frequencies == "endpoint" else half
        # float32 throughout: bfloat16 could not tell timestep 999 from 1000
        k = torch.arange(half, device=t.device, dtype=torch.float32)
        # the order of operations of ADM and diffusers: another one rounds differently, by 6e-5 at t = 1000
        angles = t.float()[:, None] * torch.exp(-math.log(10000) * k / steps)  # (B, half)
        return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.dim % 2))


class TimeMLP(nn.Sequential):
    """Embeds timesteps (B,) as (B, 4 * dim): sinusoids, plus `shift` (B, dim) if given, Linear, SiLU, Linear.

    `dtype` is that of the input of layers which do not show theirs, such as quantised ones.
    """

    def __init__(self, dim: int, frequencies: Frequencies = "endpoint") -> None:
        super().__init__(
            SinusoidalPosEmb(dim, frequencies), nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, 4 * dim)
        )

    def forward(self, t: Tensor, shift: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        sinusoids, linear1, act, linear2 = self
        h = sinusoids(t).to(compute_dtype(linear1, dtype))
        return linear2(act(linear1(h if shift is None else h + shift)))


class ClassEmbedding(nn.Embedding):
    """Embeds classes (B,), or weights of the classes (B, num_classes) as the weighted sum of their embeddings."""

    def forward(self, labels: Tensor) -> Tensor:
        return labels @ self.weight if labels.is_floating_point() else super().forward(labels)


class VectorEmbedding(nn.Sequential):
    """Embeds vectors (B, vector_dim) as (B, dim): Linear, SiLU, Linear."""

    def __init__(self, vector_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(vector_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
