"""Samples on the way from one seed to another, and from one condition to another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import INPUTS, Start
from unet_denoiser.sampling.loop import sample


def interpolate(model: UNet, process: Diffusion, *, seeds: tuple[int, int], count: int = 8, **options: Any) -> Tensor:
    """Samples on the way from one seed and its conditions to another.

    Noises go along the sphere (`slerp`), conditions along the straight line where they enter the network: the
    embeddings of classes, the tokens of captions, numbers.

    Args:
        seeds: (from, to); the same twice changes the conditions alone.
        count: samples, the first and last of them are the ends.
        options: as for `sample`, with two rows in each condition (from, to), or one for all.

    Returns:
        (count, C, *spatial).
    """
    if count < 2 or len(seeds) != 2:
        raise ValueError(f"count={count} must be at least 2, and seeds={tuple(seeds)} two of them")
    weights = torch.linspace(0, 1, count)
    for name in [name for name in INPUTS if options.get(name) is not None]:
        options[name] = between(name, options[name], weights, model.config.num_classes)
    classes, negative = options.get("class_labels"), dict(options.get("negative") or {})
    if classes is not None and classes.is_floating_point() and negative.get("class_labels") is not None:
        negative["class_labels"] = _weights(negative["class_labels"], model.config.num_classes)  # as the others are now
        options["negative"] = negative
    like = options.get("concat")
    size = options.get("image_size") or (model.config.image_size if like is None else tuple(like.shape[2:]))
    size = (size,) * model.config.dims if isinstance(size, int) else size
    shape = (process.data_channels(model.config), *size)
    ends = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    start = Start(torch.stack([slerp(ends[0], ends[1], float(weight)) for weight in weights]), add_noise=False)
    noise = [*[seeds[0]] * (count - 1), seeds[1]]  # that samplers draw on the way: the ends have their own
    return sample(model, process, seeds=noise, start=start, **options)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The point on the great circle from a (weight 0) to b (1), which has noise's length where a straight line has not.

    Source: Shoemake 1985; for noises, Song et al. 2020 (DDIM), equation 67.
    """
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).double())
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, weight)
    first, second = torch.sin((1 - weight) * angle) / angle.sin(), torch.sin(weight * angle) / angle.sin()
    return first.to(a) * a + second.to(a) * b


def between(name: str, ends: Tensor, weights: Tensor, num_classes: int | None = None) -> Tensor:
    """Conditions on the way from ends[0] to ends[1], one row for each of the weights; one row goes for all.

    Classes become weights (N, num_classes) of their embeddings; a mask lets pass what either end's does, on the way.
    """
    if len(ends) not in (1, 2):
        raise ValueError(f"{name} has {len(ends)} rows; give two, from and to, or one for all")
    if len(ends) == 1:
        return ends.expand(len(weights), *ends.shape[1:])
    if name == "class_labels":
        ends = _weights(ends, num_classes)
    w = weights.view(-1, *[1] * (ends.ndim - 1)).to(ends.device)
    if ends.dtype == torch.bool:
        return torch.where(w == 0, ends[:1], torch.where(w == 1, ends[1:], ends.any(0, keepdim=True)))
    return torch.lerp(ends[:1], ends[1:], w.to(ends))


def _weights(labels: Tensor, num_classes: int | None) -> Tensor:
    """Classes (N,) as weights (N, num_classes) of their embeddings."""
    return labels if labels.is_floating_point() else F.one_hot(labels.cpu(), num_classes or -1).float()
