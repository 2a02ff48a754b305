"""The variational bound that a learned variance is trained by (Nichol and Dhariwal 2021, arXiv 2102.09672)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class VariationalBound:
    """The terms of the bound (equations 4 to 6), for a network that chooses its variance between two limits.

    Args:
        betas: (T,) of the forward process.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        kept = (1 - betas).cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        posterior = betas * (1 - before) / (1 - kept)
        posterior[0] = posterior[min(1, len(betas) - 1)]  # it is 0 there, and has no logarithm
        of_x0 = betas * before.sqrt() / (1 - kept)
        of_xt = (1 - betas).sqrt() * (1 - before) / (1 - kept)
        self._tables = torch.stack([posterior.log(), betas.log(), of_x0, of_xt]).float()

    def __call__(
        self,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        predicted_x0: Tensor,
        variance: Tensor,
        data_range: tuple[float, float] | None,
    ) -> Tensor:
        """The term of the timestep, in bits per dimension: (B,) float32.

        KL(q(x_t-1 | x_t, x0) || p(x_t-1 | x_t)) of two Gaussians, and -log p(x0 | x_1) at t = 0.

        Args:
            x0, xt: (B, ...) data, and what `add_noise` made of them at t, (B,).
            predicted_x0: (B, ...); the mean is that of the posterior with it in the place of x0.
            variance: (B, ...) the network's v: -1 stands for the lower limit of the variance, 1 for the upper
                (equation 15, with (v + 1) / 2 as in the authors' code).
            data_range: bounds of the data, taken for 256 equal steps; None for a density of unbounded data.
        """
        self._tables = self._tables.to(t.device)  # once: torch waits for each copy to a GPU
        min_log, max_log, of_x0, of_xt = self._tables[:, t].view(4, -1, *[1] * (x0.ndim - 1))
        fraction = (variance + 1) / 2
        log_variance = fraction * max_log + (1 - fraction) * min_log
        mean, true_mean = of_x0 * predicted_x0 + of_xt * xt, of_x0 * x0 + of_xt * xt
        squared = (true_mean - mean).square() * (-log_variance).exp()
        kl = 0.5 * (log_variance - min_log + (min_log - log_variance).exp() - 1 + squared)
        nll = _negative_log_likelihood(x0, mean, log_variance, data_range)
        first = (t == 0).view(-1, *[1] * (x0.ndim - 1))
        return torch.where(first, nll, kl).flatten(1).mean(1) / math.log(2)


def _negative_log_likelihood(
    x: Tensor, mean: Tensor, log_variance: Tensor, data_range: tuple[float, float] | None
) -> Tensor:
    """-log p(x) of a Gaussian, for each value; for bounded data of the step that x is in (DDPM, equation 13)."""
    scale = (-0.5 * log_variance).exp()
    if data_range is None:
        return 0.5 * (((x - mean) * scale).square() + log_variance + math.log(2 * math.pi))
    low, high = data_range
    half = (high - low) / 510
    up, down = (x - mean + half) * scale, (x - mean - half) * scale
    below, above = torch.special.ndtr(up), torch.special.ndtr(-down)  # the outermost steps reach to infinity
    inside = below - torch.special.ndtr(down)
    probability = torch.where(x < low + half / 4, below, torch.where(x > high - half / 4, above, inside))
    return -probability.clamp(min=1e-12).log()
