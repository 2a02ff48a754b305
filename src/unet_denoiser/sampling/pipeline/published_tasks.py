"""Sampling from published networks that begin with an image: as diffusers' pipelines do, draw for draw.

An image's latents are drawn from the autoencoder's distribution. Each sample has one generator for all its noise,
which is drawn in the order of diffusers' pipelines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.sampling.arguments import Start
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.samplers import Sampler

NOISE_LEVEL = 20  # of an upscaler's small image, of the 1000 of its process; diffusers' default


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _draw(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw noise (N, *shape), each sample's by its own generator."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def inpaint_options(pipeline: Pipeline, image: Tensor, mask: Tensor, seeds: Sequence[int]) -> dict[str, Any]:
    """Return keywords of `sample` for a network that sees the mask, and the latents of the image without what it hides.

    Args:
        image: (1, C, H, W) in [-1, 1].
        mask: (1, 1, H, W) bool, True where to paint.
    """
    size, generators = tuple(n // pipeline.latent_factor for n in image.shape[2:]), _generators(seeds)
    _draw((pipeline.process.data_channels(pipeline.model.config), *size), generators)  # that of x_t comes first
    visible = torch.where(mask, 0, image).expand(len(seeds), *image.shape[1:])
    latents = pipeline.autoencoder.encode_drawn(visible, generators)
    small = F.interpolate(mask.float(), size=size).expand(len(seeds), 1, *size)
    return {"concat": torch.cat([small, latents], dim=1), "image_size": size}


def translate_options(
    pipeline: Pipeline, file: Path, size: Sequence[int] | None, seeds: Sequence[int]
) -> dict[str, Any]:
    """Return keywords of `sample` for a network that sees an image, whose latents are not scaled (InstructPix2Pix)."""
    latents = pipeline.autoencoder.encode_unscaled(pipeline.read_image(file, size))
    return {"concat": latents.expand(len(seeds), *latents.shape[1:]), "image_size": latents.shape[2:]}


def upscale_options(pipeline: Pipeline, file: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return keywords of `sample` for a network that sees a small image with noise, and the level of the noise."""
    assert pipeline.published is not None
    assert pipeline.published.low_res is not None
    small, generators = pipeline.read_image(file, keep_size=True), _generators(seeds)
    levels = torch.full((len(seeds),), NOISE_LEVEL)
    images = small.expand(len(seeds), *small.shape[1:])
    concat = pipeline.published.low_res.add_noise(images, _draw(small.shape[1:], generators), levels)
    channels = pipeline.process.data_channels(pipeline.model.config)
    start = Start(_draw((channels, *small.shape[2:]), generators), add_noise=False)
    return {"concat": concat, "class_labels": levels, "start": start, "image_size": small.shape[2:]}


def vary(pipeline: Pipeline, image: Tensor, strength: float, seeds: Sequence[int], options: dict[str, Any]) -> Tensor:
    """Return latents of variations of an image (1, C, H, W): its own, noised up to a step and denoised from there."""
    generators, count = _generators(seeds), options["config"].num_inference_steps
    latents = pipeline.autoencoder.encode_drawn(image.expand(len(seeds), *image.shape[1:]), generators)
    first = count - max(1, min(int(count * strength), count))
    alpha, sigma = Sampler(options["config"], pipeline.process, first).alpha_sigma(0)
    start = Start(alpha * latents + sigma * _draw(latents.shape[1:], generators), first, add_noise=False)
    options = options | {"start": start, "image_size": latents.shape[2:]}
    return sample(pipeline.model, pipeline.process, seeds=seeds, **options)
