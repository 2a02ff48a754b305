"""From pictures to the noise that they come from, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import Start, config_of
from unet_denoiser.sampling.loop import Step, denoise, sample
from unet_denoiser.sampling.samplers import Sampler


class Inversion(NamedTuple):
    """What `invert` finds of pictures: noise that ddim makes them of, and what that cannot hold.

    Args:
        noise: (N, C, *spatial), x_t of the first step.
        remainder: the picture less the x0 predicted in the last step, likewise: what the network takes for noise in it.
        gap: (N,) the largest error that is left in any other step's equation.
    """

    noise: Tensor
    remainder: Tensor
    gap: Tensor


def invert(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    config: SamplingConfig | None = None,
    **options_and_conditions: Any,
) -> Inversion:
    """The noise that ddim makes pictures of; `regenerate` makes them again, or others that resemble them.

    Plain DDIM inversion (Song et al. 2020, section 4.3; Dhariwal and Nichol 2021, appendix F) takes the prediction at
    x_t for that at x_(t+1). Here each step's equation, step(x_(t+1)) = x_t, is solved by fixed-point iterations that
    start there (as Pan et al. 2023, AIDI, and others do), so that the steps come back.

    Args:
        images: (N, C, *spatial) in the data's range.
        iterations: at most so many for each step; 0 is plain DDIM inversion.
        tolerance: a sample's step is solved when no value of it is further off.
        config, options_and_conditions: as for `sample`, with the conditions that belong to the pictures. The same are
            needed to make them again.

    Raises:
        ValueError: as `sample`, and for samplers other than ddim, or self-conditioning, which cannot be inverted.
    """
    if iterations < 0 or tolerance <= 0:
        raise ValueError(f"iterations={iterations} must be at least 0, and tolerance={tolerance} above 0")
    config = config_of(config, options_and_conditions, sampler="ddim")
    check_inversion(config, process)
    remainders: list[Tensor] = []
    gaps: list[Tensor] = []
    loop = partial(_inverted, iterations, tolerance, remainders, gaps)
    start = Start(images, add_noise=False)
    seeds = range(len(images))
    noise = sample(model, process, seeds=seeds, config=config, start=start, loop=loop, **options_and_conditions)
    return Inversion(noise, torch.cat(remainders), torch.cat(gaps))


def check_inversion(config: SamplingConfig, process: Diffusion) -> None:
    """ValueError where the steps cannot be inverted."""
    if config.sampler != "ddim":
        raise ValueError(f"sampler={config.sampler!r} cannot be inverted; give 'ddim', or leave it out")
    if config.eta > 0:
        raise ValueError(f"eta={config.eta} cannot be inverted: steps draw noise; give 0")
    if process.self_conditioning:
        raise ValueError("self_conditioning=True cannot be inverted: a step depends on those before it")


def regenerate(
    model: UNet,
    process: Diffusion,
    inversion: Inversion,
    *,
    config: SamplingConfig | None = None,
    **options_and_conditions: Any,
) -> Tensor:
    """Samples from inverted pictures: the pictures, or with other conditions what they would be with those.

    Args:
        config, options_and_conditions: as for `invert`: the same number of steps; other conditions for other pictures.

    Returns:
        (N, C, *spatial).
    """
    config = config_of(config, options_and_conditions, sampler="ddim")
    check_inversion(config, process)
    seeds, start = range(len(inversion.noise)), Start(inversion.noise, add_noise=False)
    x = sample(model, process, seeds=seeds, config=config, start=start, **options_and_conditions)
    return x + inversion.remainder


def _inverted(
    iterations: int,
    tolerance: float,
    remainders: list[Tensor],
    gaps: list[Tensor],
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Diffusion,
    x: Tensor,
    config: SamplingConfig,
    **others: Any,
) -> Iterator[Step]:
    """`denoise` backwards; it also appends each batch's remainder and gap."""
    sampler, x0, worst = Sampler(config, process), x, x.new_zeros(len(x))
    for i in reversed(range(len(sampler))):
        (alpha, sigma), after = sampler.noise_level(i), sampler.noise_level(i + 1)
        noise = (x - after.alpha * x0) / after.sigma if after.sigma else torch.zeros_like(x)
        y, gain = alpha * x0 + sigma * noise, 1 / (alpha * after.alpha + sigma * after.sigma)
        for left in reversed(range(iterations + 1)):
            step = next(denoise(predict, process, y, config, first_step=i))
            gap = x - step.x
            off = gap.abs().flatten(1).amax(1)
            if not left or not (off > tolerance).any():
                break
            y = y + gain * gap * (off > tolerance).view(-1, *[1] * (x.ndim - 1))
        if after.sigma:
            worst = torch.maximum(worst, off)
        else:
            remainders.append(gap)
        x, x0 = y, step.x0
        yield Step(step.t, x, x0)
    gaps.append(worst)
