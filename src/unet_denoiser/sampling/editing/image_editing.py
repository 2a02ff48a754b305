"""What people do to pictures with a trained network: vary them, paint into and around them, enlarge them.

All of it is `sample` with another start, an edit of every predicted x0, or another loop over the steps. So every
sampler, condition and kind of guidance works, batches do not matter, and seed i decides about result i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.data.wrappers.concat import enlarge, mask_images
from unet_denoiser.diffusion.process import Diffusion, concat_channels, data_channels
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import Start, config_of
from unet_denoiser.sampling.loop import Step, denoise, sample
from unet_denoiser.sampling.samplers import NoiseLevel, Sampler

MEMORYLESS = ("ddim", "ddpm", "euler", "euler_a")  # samplers whose next step depends on x_t alone


def image_to_image(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    *,
    seeds: Sequence[int],
    strength: float = 0.6,
    config: SamplingConfig | None = None,
    **options: Any,
) -> Tensor:
    """Variations of pictures: noise is added up to a step, and taken away again (Meng et al. 2021, SDEdit).

    Args:
        images: (N, C, *spatial) in the data's range, one per seed or one for all.
        strength: share of the steps that are done: near 0 returns nearly the picture, 1 forgets it and is `sample`.
        seeds, config, options: as for `sample`.

    Returns:
        (len(seeds), C, *spatial).

    Raises:
        ValueError: as `sample`, and for a strength that is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1")
    config, images = config_of(config, options), _per_seed("images", images, seeds)
    first = config.num_inference_steps - max(1, round(strength * config.num_inference_steps))
    start = Start(images, first) if first else None
    return sample(model, process, seeds=seeds, image_size=images.shape[2:], config=config, start=start, **options)


# ---- painting --------------------------------------------------------------------------------------------------------


def inpaint(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    mask: Tensor,
    *,
    seeds: Sequence[int],
    resample: int = 1,
    **options: Any,
) -> Tensor:
    """Paint what is masked, with any network; the rest comes back exactly.

    In every step the known pixels take their place in the predicted x0. A network that was trained for inpainting sees
    mask and picture too.

    Args:
        images: (N, C, *spatial) in the data's range, one per seed or one for all.
        mask: (N, 1, *spatial) bool, True where to paint, likewise.
        resample: how often each step is done; in between, x_t is noised again, so that what is painted and what is
            known come to fit each other (Lugmayr et al. 2022, RePaint). Only with samplers that carry nothing from
            step to step: ddim (the default then), ddpm, euler and euler_a.
        seeds, options: as for `sample`.

    Returns:
        (len(seeds), C, *spatial).

    Raises:
        ValueError: as `sample`, and for a mask of another size, or a sampler that cannot resample.
    """
    images, mask = _per_seed("images", images, seeds), _per_seed("mask", mask, seeds).bool()
    if mask.shape[1] != 1 or mask.shape[2:] != images.shape[2:]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; images of {tuple(images.shape)} need one channel of it")
    device = model.input_conv.weight.device
    images, mask = images.to(device), mask.to(device)
    if concat_channels(model.config, process) == images.shape[1] + 1:
        options.setdefault("concat", mask_images(images, mask))

    def edit(x0: Tensor, t: float, rows: slice) -> Tensor:
        return torch.where(mask[rows], x0, images[rows])

    painted = _painted(model, process, images, edit, seeds, resample, options)
    return torch.where(mask, painted, images)


def outpaint(
    model: UNet, process: Diffusion, images: Tensor, margins: Sequence[int], *, seeds: Sequence[int], **options: Any
) -> Tensor:
    """Enlarge the canvas of pictures (N, C, H, W) and paint the new margins: `inpaint` of `canvas(images, margins)`.

    Args:
        margins: pixels to add at the top, right, bottom and left.
        seeds, options: as for `inpaint`.

    Returns:
        (len(seeds), C, top + H + bottom, left + W + right).
    """
    return inpaint(model, process, *canvas(images, margins), seeds=seeds, **options)


def canvas(images: Tensor, margins: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pictures (N, C, H, W) within margins (top, right, bottom, left) of repeated edges, and the mask of what is new.

    Raises:
        ValueError: margins that are not four numbers of at least 0.
    """
    if len(margins) != 4 or min(margins) < 0:
        raise ValueError(f"margins={tuple(margins)} must be pixels at the top, right, bottom and left")
    top, right, bottom, left = margins
    sides = (left, right, top, bottom)
    mask = F.pad(torch.zeros(len(images), 1, *images.shape[2:]), sides, value=1.0).bool()
    return F.pad(images, sides, mode="replicate"), mask.to(images.device)


def upscale(
    model: UNet,
    process: Diffusion,
    images: Tensor,
    factor: int,
    *,
    seeds: Sequence[int],
    resample: int = 1,
    **options: Any,
) -> Tensor:
    """Super-resolution with any network: samples whose averages over factor x factor pixels are the small pictures.

    In every step the averages of the predicted x0 are replaced, its details stay (Wang et al. 2022, DDNM: range-space
    replacement, with average pooling). A network that was trained with `concat="downscaled:N"` is shown the picture
    enlarged instead, as in training.

    Args:
        images: (N, C, h, w) in the data's range, one per seed or one for all.
        factor: how many times as large.
        seeds, resample, options: as for `inpaint`.

    Returns:
        (len(seeds), C, factor * h, factor * w).
    """
    if factor < 2:
        raise ValueError(f"factor={factor} must be at least 2")
    images = _per_seed("images", images, seeds).to(model.input_conv.weight.device)
    size = tuple(n * factor for n in images.shape[2:])
    if concat_channels(model.config, process) == images.shape[1]:
        return sample(model, process, seeds=seeds, concat=enlarge(images, size), **options)

    def edit(x0: Tensor, t: float, rows: slice) -> Tensor:
        return x0 + _repeated(images[rows] - F.avg_pool2d(x0, factor), factor)

    return _painted(model, process, _repeated(images, factor), edit, seeds, resample, options)


def _repeated(x: Tensor, factor: int) -> Tensor:
    return x.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _painted(
    model: UNet,
    process: Diffusion,
    like: Tensor,
    edit: Callable[[Tensor, float, slice], Tensor],
    seeds: Sequence[int],
    resample: int,
    options: dict[str, Any],
) -> Tensor:
    if resample < 1:
        raise ValueError(f"resample={resample} must be at least 1")
    if like.shape[1] != (channels := data_channels(model.config, process)):
        raise ValueError(f"images have {like.shape[1]} channels; the samples have {channels}")
    if resample > 1:
        options["config"] = config_of(options.get("config"), options, sampler="ddim")
        check_resampling(options["config"], process, resample)
        options["loop"] = partial(_resampled, resample)
    return sample(model, process, seeds=seeds, image_size=like.shape[2:], edit=edit, **options)


def check_resampling(config: SamplingConfig, process: Diffusion, resample: int) -> None:
    """ValueError where a step cannot be repeated since it depends on more than x_t."""
    if config.sampler not in MEMORYLESS:
        raise ValueError(
            f"resample={resample} with sampler={config.sampler!r}, whose steps depend on those before; use "
            f"{', '.join(map(repr, MEMORYLESS))}"
        )
    if process.self_conditioning:
        raise ValueError(f"resample={resample} with self_conditioning=True: steps depend on those before; give 1")


def _resampled(
    repeats: int,
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Diffusion,
    x: Tensor,
    config: SamplingConfig,
    *,
    first_step: int = 0,
    generators: Sequence[torch.Generator],
    **options: Any,
) -> Iterator[Step]:
    """`denoise`, with every step done `repeats` times (RePaint, algorithm 1, jumps of one step)."""
    sampler = Sampler(config, process)
    for i in range(first_step, len(sampler)):
        for left in reversed(range(repeats)):
            step = next(denoise(predict, process, x, config, first_step=i, generators=list(generators), **options))
            yield step
            x = step.x
            if left:
                x = _noised(x, sampler.noise_level(i + 1), sampler.noise_level(i), generators)


def _noised(x: Tensor, now: NoiseLevel, to: NoiseLevel, generators: Sequence[torch.Generator]) -> Tensor:
    """From q(x_t | x_s) of the forward process, s before t."""
    scale = to.alpha / now.alpha
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x)
    return scale * x + (to.sigma**2 - (scale * now.sigma) ** 2).clamp(min=0).sqrt() * noise


def _per_seed(name: str, x: Tensor, seeds: Sequence[int]) -> Tensor:
    if len(x) not in (1, len(seeds)):
        raise ValueError(f"{name} has {len(x)} rows for {len(seeds)} seeds; give one row per seed, or one for all")
    return x.expand(len(seeds), *x.shape[1:])
