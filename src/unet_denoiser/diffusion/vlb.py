"""The variational bound that trains a learned variance (Nichol and Dhariwal 2021, arXiv 2102.09672)."""

import math

import torch
from torch import Tensor

from unet_denoiser.utils.broadcasting import append_dims


class VariationalBound:
    """The terms of the bound (equations 4 to 6) for a network that interpolates its variance between two limits.

    Args:
        betas: (T,) of the forward process.
    """

    def __init__(self, betas: Tensor) -> None:
        betas = betas.double()
        alpha_bar = (1 - betas).cumprod(0)
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        # the posterior q(x_t-1 | x_t, x0): its variance, and its mean as a sum of x0 and x_t (DDPM, equation 7)
        posterior_variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        posterior_variance[0] = posterior_variance[min(1, len(betas) - 1)]  # 0 at t = 0 has no logarithm
        x0_factor = betas * alpha_bar_prev.sqrt() / (1 - alpha_bar)
        xt_factor = (1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
        self._tables = torch.stack([posterior_variance.log(), betas.log(), x0_factor, xt_factor]).float()

    def __call__(
        self,
        x0: Tensor,
        xt: Tensor,
        t: Tensor,
        predicted_x0: Tensor,
        variance: Tensor,
        *,
        data_range: tuple[float, float] | None,
    ) -> Tensor:
        """Compute the bound's term of each timestep, in bits per dimension: (B,) float32.

        It is KL(q(x_t-1 | x_t, x0) || p(x_t-1 | x_t)) of two Gaussians, and -log p(x0 | x_1) at t = 0.

        Args:
            x0: (B, ...) data.
            xt: (B, ...) `add_noise` of x0 at t (B,).
            predicted_x0: (B, ...); the mean of p is the posterior's mean with it in place of x0.
            variance: (B, ...) the network's output v, mapped so that -1 is the lower limit and 1 the upper (equation
                15, with (v + 1) / 2 as in the authors' code).
            data_range: bounds of the data, divided into 256 equal steps; None for a density of unbounded data.
        """
        self._tables = self._tables.to(t.device)  # once: torch waits for each copy to a GPU
        min_log, max_log, x0_factor, xt_factor = append_dims(self._tables[:, t], x0.ndim + 1)  # (B, 1, ...) each
        fraction = (variance + 1) / 2
        log_variance = fraction * max_log + (1 - fraction) * min_log  # equation 15
        mean, true_mean = x0_factor * predicted_x0 + xt_factor * xt, x0_factor * x0 + xt_factor * xt
        squared = (true_mean - mean).square() * (-log_variance).exp()
        kl = 0.5 * (log_variance - min_log + (min_log - log_variance).exp() - 1 + squared)
        nll = _negative_log_likelihood(x0, mean, log_variance, data_range)
        is_first = append_dims(t == 0, x0.ndim)
        return torch.where(is_first, nll, kl).flatten(1).mean(1) / math.log(2)


def _negative_log_likelihood(
    x: Tensor, mean: Tensor, log_variance: Tensor, data_range: tuple[float, float] | None
) -> Tensor:
    """Compute -log p(x) of a Gaussian per value; for bounded data, of the step that holds x (DDPM, equation 13)."""
    scale = (-0.5 * log_variance).exp()
    if data_range is None:
        return 0.5 * (((x - mean) * scale).square() + log_variance + math.log(2 * math.pi))
    low, high = data_range
    half = (high - low) / 510  # half the width of one of 256 steps
    up, down = (x - mean + half) * scale, (x - mean - half) * scale
    below, above = torch.special.ndtr(up), torch.special.ndtr(-down)  # the outermost steps reach to infinity
    inside = below - torch.special.ndtr(down)
    probability = torch.where(x < low + half / 4, below, torch.where(x > high - half / 4, above, inside))
    return -probability.clamp(min=1e-12).log()
