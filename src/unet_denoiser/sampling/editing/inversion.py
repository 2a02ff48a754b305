"""DDIM inversion: from images to the noise that they come from, and back."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import Start, pop_config
from unet_denoiser.sampling.guidance import Guidance
from unet_denoiser.sampling.loop import Step, denoise_step, sample, sample_steps
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.utils.broadcasting import append_dims


class Inversion(NamedTuple):
    """The result of `invert`.

    Args:
        noise: (N, C, *spatial) x_t of the first step, from which ddim makes the images.
        remainder: (N, C, *spatial) the images less the x0 predicted in the last step: the part of an image that the
            network takes for noise.
        gap: (N,) largest error left in the equation of any other step.
    """

    noise: Tensor
    remainder: Tensor
    gap: Tensor


def invert(
    model: UNet, process: Diffusion, images: Tensor, *, iterations: int = 20, tolerance: float = 1e-4, **request: Any
) -> Inversion:
    """Find the noise from which ddim makes images; `regenerate` makes them again, or variations.

    Plain DDIM inversion (Song et al. 2020, section 4.3; Dhariwal and Nichol 2021, appendix F) takes the prediction at
    x_t for the one at x_(t+1). Here fixed-point iterations that start there solve each step's equation,
    step(x_(t+1)) = x_t (as Pan et al. 2023, AIDI), so that sampling returns the images.

    Args:
        images: (N, C, *spatial) in the data's range.
        iterations: the most iterations per step; 0 is plain DDIM inversion.
        tolerance: a sample's step is solved when no value is off by more.
        request: keywords of `sample`, with the conditions of the images; `regenerate` needs the same.

    Raises:
        ValueError: as `sample`, and for other samplers than ddim or self-conditioning, which cannot be inverted.
    """
    if iterations < 0 or tolerance <= 0:
        raise ValueError(f"iterations={iterations} must be at least 0, and tolerance={tolerance} above 0")
    on_step, config = request.pop("on_step", None), pop_config(request, sampler="ddim")
    check_inversion(config, process)
    request |= {"config": config, "start": Start(images, add_noise=False)}
    loop = partial(invert_steps, iterations=iterations, tolerance=tolerance)
    batches: dict[int, Inversion] = {}
    for step in sample_steps(model, process, seeds=range(len(images)), loop=loop, **request):
        if on_step is not None:
            on_step(step)
        assert step.residual is not None
        first, gap = step.indices.start, _max_abs(step.residual)
        if first not in batches:  # the step to x0 comes first; sampling cannot make up for its error
            batches[first] = Inversion(step.x, step.residual, torch.zeros_like(gap))
        else:
            batches[first] = Inversion(step.x, batches[first].remainder, torch.maximum(batches[first].gap, gap))
    return Inversion(*map(torch.cat, zip(*batches.values(), strict=True)))


def invert_steps(
    guidance: Guidance, sampler: Sampler, x: Tensor, *, iterations: int, tolerance: float, **_: Any
) -> Iterator[Step]:
    """Run ddim backwards, from data x (B, C, *spatial) to noise; see `invert`."""
    x0 = x
    for i in reversed(range(len(sampler))):
        (alpha, sigma), (alpha_after, sigma_after) = sampler.alpha_sigma(i), sampler.alpha_sigma(i + 1)
        noise = (x - alpha_after * x0) / sigma_after if sigma_after else torch.zeros_like(x)
        y = alpha * x0 + sigma * noise  # DDIM, equation 12 with eta = 0, from x_t to x_(t+1)
        gain = 1 / (alpha * alpha_after + sigma * sigma_after)  # inverse of dx_t / dx_(t+1) where v does not change
        for left in reversed(range(iterations + 1)):
            step = denoise_step(guidance, sampler, y, i)
            residual = x - step.x
            unsolved = _max_abs(residual) > tolerance  # (B,)
            if not left or not unsolved.any():
                break
            y = y + gain * residual * append_dims(unsolved, x.ndim)
        x, x0 = y, step.x0
        yield Step(step.t, x, x0, residual=residual)


def _max_abs(x: Tensor) -> Tensor:
    """Return the largest absolute value of each sample, (B,)."""
    return x.abs().flatten(1).amax(1)


def check_inversion(config: SamplingConfig, process: Diffusion) -> None:
    """Raise ValueError for a sampler or process whose steps cannot be inverted."""
    if process.distillation is not None:
        raise ValueError(f"{process.distillation.describe()}, which cannot be inverted; invert with its teacher")
    if config.sampler != "ddim":
        raise ValueError(f"sampler={config.sampler!r} cannot be inverted; give 'ddim', or leave it out")
    if config.eta > 0:
        raise ValueError(f"eta={config.eta} cannot be inverted: steps draw noise; give 0")
    if process.self_conditioning:
        raise ValueError("self_conditioning=True cannot be inverted: a step depends on those before it")


def regenerate(model: UNet, process: Diffusion, inversion: Inversion, **request: Any) -> Tensor:
    """Sample from inverted images: the images again, or variations under other conditions.

    Args:
        request: keywords of `sample`, with the number of steps that `invert` had.

    Returns:
        (N, C, *spatial).
    """
    config = pop_config(request, sampler="ddim")
    check_inversion(config, process)
    seeds, start = range(len(inversion.noise)), Start(inversion.noise, add_noise=False)
    return sample(model, process, seeds=seeds, config=config, start=start, **request) + inversion.remainder
