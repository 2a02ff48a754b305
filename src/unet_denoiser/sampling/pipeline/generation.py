"""What `unet-denoiser sample` does with a run: from names and picture files to samples, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.editing import DEFAULT_STRENGTH, EditingConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.editing.image_editing import image_to_image, inpaint, pad_canvas, upscale
from unet_denoiser.sampling.editing.interpolation import interpolate
from unet_denoiser.sampling.editing.inversion import invert, regenerate
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class GenerationRequest:
    """Samples that are asked of a run.

    Args:
        edit: what to make of which picture.
        config: how.
        seeds: one per sample.
        classes, captions: take turns; no class is every class of the run in turn.
        vector: everybody's numbers.
        concat_image: a file, for a network that sees a picture.
        image_size: of the samples, or of the picture that is given; in pixels.
        negative_class, negative_caption: what guidance leads away from, in place of nothing.
        guide: a weaker network that guidance leads away from.
    """

    edit: EditingConfig
    config: SamplingConfig
    seeds: Sequence[int]
    classes: Sequence[str] = ()
    captions: Sequence[str] = ()
    vector: Sequence[float] = ()
    concat_image: Path | None = None
    image_size: tuple[int, ...] | None = None
    negative_class: str | None = None
    negative_caption: str | None = None
    guide: UNet | None = None


def generate(run: Pipeline, model: UNet, request: GenerationRequest, **options: Any) -> Tensor:
    """The samples, decoded.

    Args:
        options: of `sample`: batch_size, on_step.

    Raises:
        ValueError, OSError: what cannot work, in one line and before the network runs.
    """
    edit, count = request.edit, len(request.seeds)
    options |= {"config": request.config} | _conditions(run, request)
    options |= {"negative": _negative(run, request), "guide": request.guide}
    followed = {"class_labels", "vector", "context", "concat"} & set(options) or run.data.concat is not None
    if not followed and request.guide is None and request.config.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale={request.config.guidance_scale} needs a class, caption, vector or picture to follow; "
            "give one, or 1"
        )
    if (options["negative"] or request.guide is not None) and request.config.guidance_scale == 1:
        raise ValueError(
            "guidance_scale=1 leads away from nothing: with a negative or a guide give 2 to 5, for example"
        )
    if edit.image is not None:
        return _edit(run, model, request, options)
    options["image_size"] = run.sample_size(request.image_size)
    if edit.interpolates:
        seeds = edit.interpolate_seeds or (request.seeds[0], request.seeds[0])
        return run.decode(interpolate(model, run.process, seeds=seeds, count=count, **options))
    return run.decode(sample(model, run.process, seeds=request.seeds, **options))


def _edit(run: Pipeline, model: UNet, request: GenerationRequest, options: dict[str, Any]) -> Tensor:
    edit, seeds, process = request.edit, request.seeds, run.process
    assert edit.image is not None
    if edit.upscale is not None:
        _check_upscaling(run, edit.upscale)
        if request.image_size is not None:
            raise ValueError(f"image_size={request.image_size}: upscale={edit.upscale} sets the size; leave it out")
        small = run.read_picture(edit.image, as_it_is=True)
        return upscale(model, process, small, edit.upscale, seeds=seeds, resample=edit.resample, **options)
    picture = run.read_picture(edit.image, request.image_size)
    if edit.mask is not None or edit.outpaint is not None:
        if edit.outpaint is not None:
            picture, mask = pad_canvas(picture, edit.outpaint)
            if any(n % run.latent_factor for n in picture.shape[2:]):
                raise ValueError(
                    f"outpaint={edit.outpaint} makes a picture of {tuple(picture.shape[2:])}; with latents both must "
                    f"be multiples of {run.latent_factor}"
                )
        else:
            assert edit.mask is not None
            mask = run.read_mask(edit.mask, picture.shape[2:])
        hidden = mask if run.data.vae is None else F.max_pool2d(mask.float(), run.latent_factor) > 0
        known = run.encode(picture)
        x = run.decode(inpaint(model, process, known, hidden, seeds=seeds, resample=edit.resample, **options))
        return torch.where(mask.to(x.device), x, picture.to(x))
    if edit.invert:
        return _regenerated(run, model, request, run.encode(picture), options)
    strength = DEFAULT_STRENGTH if edit.strength is None else edit.strength
    return run.decode(image_to_image(model, process, run.encode(picture), seeds=seeds, strength=strength, **options))


def _regenerated(run: Pipeline, model: UNet, request: GenerationRequest, x: Tensor, options: dict[str, Any]) -> Tensor:
    """The picture inverted with its own class or caption, and made again with each of those asked for."""
    edit, count = request.edit, len(request.seeds)
    own = dict(options) | {"config": replace(request.config, guidance_scale=1.0)}
    for name in ("on_step", "negative", "guide"):
        own.pop(name, None)
    if edit.image_class is not None:
        own["class_labels"] = run.labels(count, [edit.image_class])
    if edit.image_caption is not None:
        own |= run.encode_captions([edit.image_caption] * count)
    inversion = invert(model, run.process, x.expand(count, *x.shape[1:]), **own)
    return run.decode(regenerate(model, run.process, inversion, **options))


def _conditions(run: Pipeline, request: GenerationRequest) -> dict[str, Tensor]:
    """What the samples shall follow: one row each, or with interpolation one or two rows (from, to)."""
    edit, count = request.edit, len(request.seeds)
    classes, captions = edit.interpolate_classes or request.classes, edit.interpolate_captions or request.captions
    if edit.interpolates:
        count = 2
        for name, ways, names in (
            ("class", edit.interpolate_classes, request.classes),
            ("caption", edit.interpolate_captions, request.captions),
        ):
            if ways and names:
                raise ValueError(f"{name}={names[0]!r} and a way from one {name} to another: give one of them")
            if len(names) > 1:
                raise ValueError(f"{name}={names[1]!r}: with interpolation all samples have one {name}; give one")
        if run.class_names is not None and not classes and not captions:
            raise ValueError(f"interpolate_seeds needs a class of {', '.join(run.class_names)}; give one as class")
    conditions: dict[str, Tensor] = {}
    if classes or (run.class_names and not captions):
        conditions["class_labels"] = run.labels(count, classes)
    if captions:
        conditions |= run.encode_captions([captions[i % len(captions)] for i in range(count)])
    if request.vector:
        conditions["vector"] = torch.tensor(request.vector).expand(count, -1)
    if request.concat_image is not None:
        concat = run.read_concat(request.concat_image)
        conditions["concat"] = concat.expand(count, *concat.shape[1:])
    return conditions


def _negative(run: Pipeline, request: GenerationRequest) -> dict[str, Tensor]:
    """What guidance leads away from: one row for all samples."""
    negative: dict[str, Tensor] = {}
    if request.negative_class is not None:
        negative["class_labels"] = run.labels(1, [request.negative_class])
    if request.negative_caption is not None:
        negative |= run.encode_captions([request.negative_caption])
    return negative


def _check_upscaling(run: Pipeline, factor: int) -> None:
    if run.data.vae is not None:
        raise ValueError(f"upscale={factor}: {run.path} was trained on latents, whose averages are not the picture's")
    trained = (run.data.concat or "").removeprefix("downscaled:")
    if trained.isdecimal() and int(trained) != factor:
        raise ValueError(f"upscale={factor}: {run.path} was trained with concat='downscaled:{trained}'; give {trained}")
