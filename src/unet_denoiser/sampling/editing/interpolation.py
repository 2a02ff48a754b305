"""Interpolation between two seeds, and between two conditions."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import Start, as_seeds, sample_sizes
from unet_denoiser.sampling.guidance import as_conditions
from unet_denoiser.sampling.loop import sample
from unet_denoiser.utils.broadcasting import append_dims


def interpolate(model: UNet, process: Diffusion, *, seeds: tuple[int, int], count: int = 8, **request: Any) -> Tensor:
    """Sample on the way from one seed and its conditions to another.

    Noises are interpolated on the sphere (`slerp`), conditions linearly where they enter the network: the embeddings
    of classes, the tokens of captions, vectors.

    Args:
        seeds: (from, to); the same twice interpolates the conditions alone.
        count: number of samples, of which the first and the last are the ends.
        request: keywords of `sample`, with two samples in each condition (from, to), or one for all.

    Returns:
        (count, C, *spatial).
    """
    both = as_seeds(seeds)
    if count < 2 or len(both) != 2:
        raise ValueError(f"count={count} must be at least 2, and seeds={tuple(both)} two of them")
    weights, num_classes = torch.linspace(0, 1, count), model.config.num_classes
    ends = as_conditions("conditions", {name: request[name] for name in Conditions.names() if name in request}).given()
    request |= {name: interpolate_condition(name, value, weights, num_classes) for name, value in ends.items()}
    classes, negative = request.get("class_labels"), as_conditions("negative", request.get("negative"))
    if classes is not None and classes.is_floating_point() and negative.class_labels is not None:
        # class weights as well: guidance puts both into one batch
        request["negative"] = replace(negative, class_labels=_to_class_weights(negative.class_labels, num_classes))
    sizes = sample_sizes(model.config, request.get("image_size"), request.get("concat"))
    shape = (process.data_channels(model.config), *sizes)
    first, last = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in both)
    start = Start(torch.stack([slerp(first, last, float(weight)) for weight in weights]), add_noise=False)
    later_seeds = [*[both[0]] * (count - 1), both[1]]  # for noise that samplers draw on the way, as at both ends
    return sample(model, process, seeds=later_seeds, start=start, **request)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Return the point on the great circle from a (weight 0) to b (1); unlike a line, it keeps the norm of noise.

    Source: Shoemake 1985; for noises, Song et al. 2020 (DDIM), equation 67.
    """
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).double())
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, weight)
    first, second = torch.sin((1 - weight) * angle) / angle.sin(), torch.sin(weight * angle) / angle.sin()
    return first.to(a) * a + second.to(a) * b


def interpolate_condition(name: str, ends: Tensor, weights: Tensor, num_classes: int | None = None) -> Tensor:
    """Interpolate a condition from ends[0] to ends[1], one sample per weight; a single end is repeated.

    Class labels become weights (N, num_classes) of the classes. Between the ends, a mask keeps what either end keeps.
    """
    if len(ends) not in (1, 2):
        raise ValueError(f"{name} has {len(ends)} samples; give two, from and to, or one for all")
    if len(ends) == 1:
        return ends.expand(len(weights), *ends.shape[1:])
    if name == "class_labels":
        ends = _to_class_weights(ends, num_classes)
    w = append_dims(weights, ends.ndim).to(ends.device)  # (N, 1, ...)
    if ends.dtype == torch.bool:
        return torch.where(w == 0, ends[:1], torch.where(w == 1, ends[1:], ends.any(0, keepdim=True)))
    return torch.lerp(ends[:1], ends[1:], w.to(ends))


def _to_class_weights(labels: Tensor, num_classes: int | None) -> Tensor:
    """Return class labels (N,) as weights (N, num_classes)."""
    return labels if labels.is_floating_point() else F.one_hot(labels.cpu(), num_classes or -1).float()
