"""The paths from data to noise, one row each: the noise levels that the configuration of a diffusers scheduler means.

All are one path in different scales. Here x_t = alpha x0 + sigma eps is scaled to alpha^2 + sigma^2 = 1, so that the
ratio sigma / alpha tells all; what a network sees of x_t follows from its prediction type's c_in.
"""

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unet_denoiser.config.base import PathName
from unet_denoiser.config.diffusion import DENSITY_DEFAULTS

MIN_ALPHA_SQUARED = 2.0**-24  # stands for pure noise, since schedulers divide by alpha; diffusers' own choice


class Levels(NamedTuple):
    """The noise levels of a process, (T,) each, the least noisy first.

    alphas, sigmas: float32. betas: variances of the steps between the levels. ratios: sigma / alpha, finite also for
    pure noise. times: what the network is fed.
    """

    alphas: Tensor
    sigmas: Tensor
    betas: Tensor
    ratios: NDArray[np.float64]
    times: Tensor


class Path(NamedTuple):
    """One path.

    Args:
        schedulers: the classes of diffusers whose configurations are read; the first one is written.
        levels: (scheduler) -> its levels.
        stored: names of prediction types in its file, where they are not ours.
    """

    schedulers: tuple[str, ...]
    levels: Callable[[Any], Levels]
    stored: Mapping[str, str] = MappingProxyType({})


def _vp_levels(scheduler: Any) -> Levels:
    """Return the levels of betas: alpha_t^2 is the product of (1 - beta) (DDPM, equation 4); times are 0 to T - 1."""
    squared, exact = scheduler.alphas_cumprod, np.cumprod(1 - scheduler.betas.double().numpy())
    exact[exact <= 0] = MIN_ALPHA_SQUARED  # a cosine schedule's last is lower, and not pure noise
    times = torch.arange(len(squared))
    return Levels(squared.sqrt(), (1 - squared).sqrt(), scheduler.betas, np.sqrt((1 - exact) / exact), times)


def _flow_levels(scheduler: Any) -> Levels:
    """Return the levels (1 - t) x0 + t eps for t = 1/T, ..., 1, shifted (Lipman et al. 2023); times are T t."""
    t = scheduler.sigmas.double().flip(0)
    return _scale_levels(1 - t, t, scheduler.timesteps.flip(0))


def _edm_levels(scheduler: Any) -> Levels:
    """Return the levels x0 + sigma eps, sigma_min to sigma_max (Karras et al. 2022); times are log(sigma) / 4."""
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    sigma = scheduler.sigmas[:-1].double().flip(0)  # without the 0 at the end
    return _scale_levels(torch.ones_like(sigma), sigma, scheduler.timesteps.flip(0))


def _scale_levels(alpha: Tensor, sigma: Tensor, times: Tensor) -> Levels:
    """Scale levels (T,) in float64 to alpha^2 + sigma^2 = 1."""
    norm = (alpha**2 + sigma**2).sqrt()
    alpha, sigma = alpha / norm, sigma / norm
    # pure noise is finite, and noisier than the level before it also where a shift has made that noisy
    pure_noise = max(MIN_ALPHA_SQUARED**-0.5, *(2 * sigma[-2:-1] / alpha[-2:-1]).tolist(), 1.0)
    ratios = torch.where(alpha > 0, sigma / alpha, pure_noise)
    squared = 1 / (1 + ratios**2)
    betas = 1 - squared / torch.cat([torch.ones(1), squared[:-1]])
    return Levels(alpha.float(), sigma.float(), betas, ratios.numpy(), times)


PATHS: dict[PathName, Path] = {
    "vp": Path(("DDPMScheduler",), _vp_levels),
    "flow": Path(("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"), _flow_levels),
    "edm": Path(("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), _edm_levels, stored={"edm": "epsilon"}),
}


def density_quantiles(options: Mapping[str, Any], ratios: NDArray[np.float64]) -> Tensor:
    """Return the level at each of T evenly spaced quantiles of the density of training times: (T,) integers.

    A normal density's first and last quantiles are the first and the last level, which sampling needs as well.

    Args:
        options: those of `DiffusionConfig` that begin with density, and `shift`.
        ratios: (T,) sigma / alpha of the levels.
    """
    count = len(ratios)
    if (density := options["density"]) not in DENSITY_DEFAULTS:
        shares = np.cumsum([0.0, *(options["density_table"] or (1.0,))])
        quantiles, ends = (np.arange(count) + 0.5) / count, np.linspace(0, count, len(shares))
        return torch.from_numpy(np.interp(quantiles, shares / shares[-1], ends).astype(np.int64))
    pairs = zip((options["density_mean"], options["density_std"]), DENSITY_DEFAULTS[density], strict=True)
    mean, std = (default if given is None else given for given, default in pairs)
    normal = NormalDist(mean + math.log(options.get("shift", 1.0)), std)
    inner = [normal.inv_cdf(i / (count - 1)) for i in range(1, count - 1)]
    levels = np.interp(inner, np.log(ratios), np.arange(count)).round().astype(np.int64)
    return torch.from_numpy(np.concatenate([[0], levels, [count - 1]])[-count:])
