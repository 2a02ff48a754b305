"""Editing of images with a trained network: image to image, inpainting, outpainting, super-resolution.

Each is `sample` with another start, an edit of every predicted x0, or another loop over the steps. So every sampler,
condition and kind of guidance works, batches do not matter, and result i depends on seed i.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.data.wrappers.concat import enlarge, mask_images
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import Start, as_seeds, pop_config
from unet_denoiser.sampling.guidance import Guidance
from unet_denoiser.sampling.loop import Edit, Step, denoise_step, sample
from unet_denoiser.sampling.samplers import MEMORYLESS, Sampler


def image_to_image(
    model: UNet, process: Diffusion, images: Tensor, *, seeds: Sequence[int], strength: float = 0.6, **request: Any
) -> Tensor:
    """Make variations (len(seeds), C, *spatial) of images: add noise up to a step, and denoise from there.

    Source: Meng et al. 2021, SDEdit.

    Args:
        images: (N, C, *spatial) in the data's range, one per seed or one for all.
        strength: share of the steps to do: near 0 returns nearly the image, 1 ignores it and is `sample`.
        seeds, request: as for `sample`.

    Raises:
        ValueError: as `sample`, and for a strength that is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1")
    seeds = as_seeds(seeds)
    config, images = pop_config(request, **process.sampling_defaults), _expand_to_seeds("images", images, seeds)
    first = config.num_inference_steps - max(1, round(strength * config.num_inference_steps))
    start = Start(images, first) if first else None
    return sample(model, process, seeds=seeds, image_size=images.shape[2:], config=config, start=start, **request)


def inpaint(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    mask: Tensor,
    *,
    seeds: Sequence[int],
    resample: int = 1,
    **request: Any,
) -> Tensor:
    """Paint the masked pixels, with any network; the other pixels come back exactly: (len(seeds), C, *spatial).

    Every step puts the known pixels into the predicted x0. A network that was trained for inpainting sees mask and
    image too.

    Args:
        images: (N, C, *spatial) in the data's range, one per seed or one for all.
        mask: (N, 1, *spatial) bool, True where to paint, likewise.
        resample: how often each step is done. In between x_t is noised again, so that painted and known pixels come
            to fit each other (Lugmayr et al. 2022, RePaint). Only with the samplers ddim (then the default), ddpm,
            euler and euler_a, whose steps depend on x_t alone.
        seeds, request: as for `sample`.

    Raises:
        ValueError: as `sample`, and for a mask of another size, or a sampler that cannot resample.
    """
    seeds = as_seeds(seeds)
    images, mask = _expand_to_seeds("images", images, seeds), _expand_to_seeds("mask", mask, seeds).bool()
    if mask.shape[1] != 1 or mask.shape[2:] != images.shape[2:]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; images of {tuple(images.shape)} need one channel of it")
    device = model.device
    images, mask = images.to(device), mask.to(device)
    if process.concat_channels(model.config) == images.shape[1] + 1:
        request.setdefault("concat", mask_images(images, mask))

    def edit(x0: Tensor, t: float, indices: slice) -> Tensor:
        return torch.where(mask[indices], x0, images[indices])

    painted = _sample_edited(model, process, images, edit, seeds=seeds, resample=resample, request=request)
    return torch.where(mask, painted, images)


def outpaint(
    model: UNet, process: Diffusion, images: Tensor, margins: Sequence[int], *, seeds: Sequence[int], **request: Any
) -> Tensor:
    """Enlarge the canvas of images (N, C, H, W) and paint the margins: `inpaint` of `pad_canvas(images, margins)`.

    Args:
        margins: pixels to add at the top, right, bottom and left.
        seeds, request: as for `inpaint`.

    Returns:
        (len(seeds), C, top + H + bottom, left + W + right).
    """
    return inpaint(model, process, *pad_canvas(images, margins), seeds=seeds, **request)


def pad_canvas(images: Tensor, margins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pad images (N, C, H, W) by margins (top, right, bottom, left) of repeated edges; also return the margins' mask.

    Raises:
        ValueError: margins that are not four numbers of at least 0.
    """
    if len(margins) != 4 or min(margins) < 0:
        raise ValueError(f"margins={tuple(margins)} must be pixels at the top, right, bottom and left")
    top, right, bottom, left = margins
    padding = (left, right, top, bottom)
    mask = F.pad(torch.zeros(len(images), 1, *images.shape[2:]), padding, value=1.0).bool()
    return F.pad(images, padding, mode="replicate"), mask.to(images.device)


def upscale(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    factor: int,
    *,
    seeds: Sequence[int],
    resample: int = 1,
    **request: Any,
) -> Tensor:
    """Sample images whose averages over factor x factor pixels are the given ones (super-resolution, any network).

    Every step replaces the averages of the predicted x0 and keeps its details (Wang et al. 2022, DDNM, algorithm 1,
    with average pooling as A). A network that was trained with `concat="downscaled:N"` sees the enlarged image
    instead, as in training.

    Args:
        images: (N, C, h, w) in the data's range, one per seed or one for all.
        factor: how many times as large.
        seeds, resample, request: as for `inpaint`.

    Returns:
        (len(seeds), C, factor * h, factor * w).
    """
    if factor < 2:
        raise ValueError(f"factor={factor} must be at least 2")
    seeds = as_seeds(seeds)
    images = _expand_to_seeds("images", images, seeds).to(model.device)
    size = tuple(n * factor for n in images.shape[2:])
    if process.concat_channels(model.config) == images.shape[1]:
        return sample(model, process, seeds=seeds, concat=enlarge(images, size), **request)

    def edit(x0: Tensor, t: float, indices: slice) -> Tensor:
        # x0 + A^+ (y - A x0), with A the average pooling and A^+ the repetition of pixels
        return x0 + _repeat_pixels(images[indices] - F.avg_pool2d(x0, factor), factor)

    large = _repeat_pixels(images, factor)
    return _sample_edited(model, process, large, edit, seeds=seeds, resample=resample, request=request)


def _repeat_pixels(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _expand_to_seeds(name: str, x: Tensor, seeds: Sequence[int]) -> Tensor:
    if len(x) not in (1, len(seeds)):
        raise ValueError(f"{name} has {len(x)} samples for {len(seeds)} seeds; give one per seed, or one for all")
    return x.expand(len(seeds), *x.shape[1:])


def _sample_edited(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    edit: Callable[[Tensor, float, slice], Tensor],
    *,
    seeds: Sequence[int],
    resample: int,
    request: dict[str, Any],
) -> Tensor:
    """Sample with an edit of every predicted x0 and each step done `resample` times, in the size of `images`."""
    if resample < 1:
        raise ValueError(f"resample={resample} must be at least 1")
    if images.shape[1] != (channels := process.data_channels(model.config)):
        raise ValueError(f"images have {images.shape[1]} channels; the samples have {channels}")
    if resample > 1:
        request["config"] = config = pop_config(request, **{"sampler": "ddim"} | process.sampling_defaults)
        if config.sampler not in MEMORYLESS:
            raise ValueError(
                f"resample={resample} with sampler={config.sampler!r}, whose steps depend on those before; use "
                f"{', '.join(map(repr, MEMORYLESS))}"
            )
        if process.self_conditioning:
            raise ValueError(f"resample={resample} with self_conditioning=True: steps depend on those before; give 1")
        request["loop"] = partial(_resample_steps, repeats=resample)
    return sample(model, process, seeds=seeds, image_size=images.shape[2:], edit=edit, **request)


def _resample_steps(
    guidance: Guidance, sampler: Sampler, x: Tensor, *, repeats: int, edit: Edit, generators: list[torch.Generator]
) -> Iterator[Step]:
    """Do every step of a sampler `repeats` times (RePaint, algorithm 1, with jumps of one step)."""
    for i in range(len(sampler)):
        (alpha, sigma), (alpha_after, sigma_after) = sampler.alpha_sigma(i), sampler.alpha_sigma(i + 1)
        scale = alpha / alpha_after
        for left in reversed(range(repeats)):
            step = denoise_step(guidance, sampler, x, i, edit=edit, generators=generators)
            yield step
            x = step.x
            if left:  # draw x_t again from q(x_t | x_s) of the forward process, s < t
                noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
                x = scale * x + (sigma**2 - (scale * sigma_after) ** 2).clamp(min=0).sqrt() * noise
