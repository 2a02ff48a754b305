"""The work of `unet-denoiser sample`: from class names, captions and image files to images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.editing import DEFAULT_STRENGTH, EditingConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.editing.image_editing import image_to_image, inpaint, pad_canvas, upscale
from unet_denoiser.sampling.editing.interpolation import interpolate
from unet_denoiser.sampling.editing.inversion import invert, regenerate
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.pipeline.published_tasks import inpaint_options, translate_options, upscale_options, vary


@dataclass(frozen=True)
class GenerationRequest:
    """Images that are asked of a pipeline.

    Args:
        edit: the image to edit and how, or the ends of an interpolation.
        seeds: one per image.
        classes, captions: given to the images in turn; without either, all classes of the pipeline.
        vector: numbers that condition every image.
        concat_image: file of an image that the network sees, if it was trained with one.
        image_size: in pixels, of the images, or of the image to edit.
        negative_class, negative_caption: what guidance leads away from, instead of no condition.
        guide: a weaker network, for autoguidance.
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


def generate(pipeline: Pipeline, request: GenerationRequest, **options: Any) -> Tensor:
    """Return the images that a request asks for, (N, C, *spatial) in the pipeline's `image_range`.

    `options` are `batch_size` and `on_step` of `sample`. ValueError or OSError if the request cannot be fulfilled: in
    one line, before the network runs.
    """
    edit, process, model = request.edit, pipeline.process, pipeline.model
    if pipeline.published is not None:
        _check_published(pipeline, request)
    conditions, negative = _read_conditions(pipeline, request), _read_negative(pipeline, request)
    conditional = bool(conditions.given()) or pipeline.data.concat is not None
    _check_guidance(request, conditional, has_negative=bool(negative.given()))
    if request.config.guidance_scale != 1 and request.guide is None and not negative.given():
        negative = pipeline.encode_absence(conditions, request.image_size)
    options |= {"config": request.config, "negative": negative.given(), "guide": request.guide, **conditions.given()}
    options |= _published_options(pipeline, request, options)
    if edit.image is not None:
        return _edit_image(pipeline, request, edit.image, options)
    options.setdefault("image_size", pipeline.sample_size(request.image_size))
    if edit.interpolates:
        seeds = edit.interpolate_seeds or (request.seeds[0], request.seeds[0])
        return pipeline.decode(interpolate(model, process, seeds=seeds, count=len(request.seeds), **options))
    return pipeline.decode(sample(model, process, seeds=request.seeds, **options))


def _read_conditions(pipeline: Pipeline, request: GenerationRequest) -> Conditions:
    """Return the conditions of the images: one per seed, or for an interpolation one or two (from, to)."""
    edit, count = request.edit, 2 if request.edit.interpolates else len(request.seeds)
    if edit.interpolates:
        _check_interpolation(pipeline, request)
    classes, captions = edit.interpolate_classes or request.classes, edit.interpolate_captions or request.captions
    conditions = Conditions()
    if captions:
        conditions = pipeline.encode_captions([captions[i % len(captions)] for i in range(count)], request.image_size)
    if classes or (pipeline.class_names and not captions):
        conditions = replace(conditions, class_labels=pipeline.labels(count, classes))
    if request.vector:
        conditions = replace(conditions, vector=torch.tensor(request.vector).expand(count, -1))
    if request.concat_image is not None and pipeline.published is None:
        concat = pipeline.read_concat(request.concat_image)
        conditions = replace(conditions, concat=concat.expand(count, *concat.shape[1:]))
    return conditions


def _check_interpolation(pipeline: Pipeline, request: GenerationRequest) -> None:
    """Raise ValueError unless each condition is given once, either fixed or as two ends."""
    edit = request.edit
    for name, ends, names in (
        ("class", edit.interpolate_classes, request.classes),
        ("caption", edit.interpolate_captions, request.captions),
    ):
        if ends and names:
            raise ValueError(f"{name}={names[0]!r} and a way from one {name} to another: give one of them")
        if len(names) > 1:
            raise ValueError(f"{name}={names[1]!r}: with interpolation all samples have one {name}; give one")
    given = edit.interpolate_classes or request.classes or edit.interpolate_captions or request.captions
    if pipeline.class_names is not None and not given:
        raise ValueError(f"interpolate_seeds needs a class of {', '.join(pipeline.class_names)}; give one as class")


def _read_negative(pipeline: Pipeline, request: GenerationRequest) -> Conditions:
    """Return the negative conditions, one for all images."""
    negative = Conditions()
    if request.negative_caption is not None:
        negative = pipeline.encode_captions([request.negative_caption], request.image_size, negative=True)
    if request.negative_class is not None:
        negative = replace(negative, class_labels=pipeline.labels(1, [request.negative_class]))
    return negative


def _check_published(pipeline: Pipeline, request: GenerationRequest) -> None:
    """Raise ValueError for a request without what the network of a published pipeline needs, or with what it lacks."""
    assert pipeline.published is not None
    edit, task, whose = request.edit, pipeline.published.task, f"{pipeline.path}, a {pipeline.published.name},"
    if pipeline.data.text_encoder is not None and not (request.captions or edit.interpolate_captions):
        raise ValueError(f"{whose} draws what a caption says; give caption, for example 'a red fox'")
    if task == "inpainting" and edit.mask is None and edit.outpaint is None:
        raise ValueError(f"{whose} paints into an image; give image, and mask or outpaint")
    if task == "inpainting" and edit.resample > 1:
        raise ValueError(f"resample={edit.resample}: {whose} was trained to fit what it paints; leave it out")
    changes_image = task in ("translation", "upscaling")
    if changes_image != (request.concat_image is not None):
        found = f"concat_image={request.concat_image}: " * (request.concat_image is not None)
        raise ValueError(
            f"{found}{whose} sees {'an' if changes_image else 'no such'} image; "
            + ("give it as concat_image" if changes_image else "leave it out")
        )
    if changes_image and (edit.image is not None or edit.interpolates):
        raise ValueError(f"{whose} makes images from that of concat_image alone; leave out other ways of editing")
    if request.vector:
        raise ValueError(f"vector={request.vector}: {whose} computes its own; leave it out")


def _published_options(pipeline: Pipeline, request: GenerationRequest, options: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of `sample` that the task of a published pipeline adds to `options`."""
    task = None if pipeline.published is None else pipeline.published.task
    more: dict[str, Any] = {}
    if task in ("inpainting", "upscaling") and options["negative"]:  # the image stays in the reference of guidance
        more["guided"] = tuple(name for name in options["negative"] if name != "context_mask")
    if task == "translation" and request.concat_image is not None:
        more |= translate_options(pipeline, request.concat_image, request.image_size, request.seeds)
    if task == "upscaling" and request.concat_image is not None:
        more |= upscale_options(pipeline, request.concat_image, request.seeds)
    return more


def _check_guidance(request: GenerationRequest, conditional: bool, has_negative: bool) -> None:
    """Raise ValueError if guidance has nothing to lead to, or if it is off although something is given to lead from."""
    scale, guide = request.config.guidance_scale, request.guide
    if not conditional and guide is None and scale != 1:
        raise ValueError(f"guidance_scale={scale} needs a class, caption, vector or image to follow; give one, or 1")
    if (has_negative or guide is not None) and scale == 1:
        raise ValueError("guidance_scale=1 leads away from nothing: with a negative or guide give 2 to 5, for example")


def _edit_image(pipeline: Pipeline, request: GenerationRequest, file: Path, options: dict[str, Any]) -> Tensor:
    """Return edited versions of an image file; `options` are arguments of `sample`."""
    edit = request.edit
    if edit.upscale is not None:
        return _upscale(pipeline, request, pipeline.read_image(file, keep_size=True), options)
    image = pipeline.read_image(file, request.image_size)
    if edit.mask is not None or edit.outpaint is not None:
        return _inpaint(pipeline, request, image, options)
    if edit.invert:
        return _regenerate(pipeline, request, image, options)
    strength = DEFAULT_STRENGTH if edit.strength is None else edit.strength
    if pipeline.published is not None and pipeline.data.vae is not None:
        return pipeline.decode(vary(pipeline, image, strength, request.seeds, options))
    options["strength"] = strength
    x = pipeline.encode(image)
    return pipeline.decode(image_to_image(pipeline.model, pipeline.process, x, seeds=request.seeds, **options))


def _upscale(pipeline: Pipeline, request: GenerationRequest, small: Tensor, options: dict[str, Any]) -> Tensor:
    """Return images whose averages over squares are `small` (1, C, h, w)."""
    edit, factor, data = request.edit, request.edit.upscale, pipeline.data
    assert factor is not None
    training = f"upscale={factor}: {pipeline.path} was trained"
    if data.vae is not None:
        raise ValueError(f"{training} on latents, whose averages are not the image's")
    kind = data.concat_kind
    if kind is not None and kind.name == "downscaled" and kind.factor != factor:
        raise ValueError(f"{training} with concat={data.concat!r}; give {kind.factor}")
    if request.image_size is not None:
        raise ValueError(f"image_size={request.image_size}: upscale={factor} sets the size; leave it out")
    options |= {"seeds": request.seeds, "resample": edit.resample}
    return upscale(pipeline.model, pipeline.process, small, factor, **options)


def _inpaint(pipeline: Pipeline, request: GenerationRequest, image: Tensor, options: dict[str, Any]) -> Tensor:
    """Return versions of an image (1, C, H, W) that are new inside a mask, or in margins around it."""
    edit, factor = request.edit, pipeline.latent_factor
    if edit.outpaint is not None:
        image, mask = pad_canvas(image, edit.outpaint)
        if any(n % factor for n in image.shape[2:]):
            made = f"outpaint={edit.outpaint} makes an image of {tuple(image.shape[2:])}"
            raise ValueError(f"{made}; with latents both must be multiples of {factor}")
    else:
        assert edit.mask is not None
        mask = pipeline.read_mask(edit.mask, image.shape[2:])
    if pipeline.published is not None and pipeline.published.task == "inpainting":
        options |= inpaint_options(pipeline, image, mask, request.seeds)
        x = pipeline.decode(sample(pipeline.model, pipeline.process, seeds=request.seeds, **options))
        return torch.where(mask.to(x.device), x, image.to(x))
    hidden = F.max_pool2d(mask.float(), factor) > 0  # a latent is new if any of its pixels is
    options |= {"seeds": request.seeds, "resample": edit.resample}
    x = pipeline.decode(inpaint(pipeline.model, pipeline.process, pipeline.encode(image), hidden, **options))
    return torch.where(mask.to(x.device), x, image.to(x))


def _regenerate(pipeline: Pipeline, request: GenerationRequest, image: Tensor, options: dict[str, Any]) -> Tensor:
    """Invert an image with its own class or caption, and generate it again with those of the request."""
    edit, count, model, process = request.edit, len(request.seeds), pipeline.model, pipeline.process
    original = {name: value for name, value in options.items() if name not in ("on_step", "negative", "guide")}
    original["config"] = replace(request.config, guidance_scale=1.0)
    if edit.image_class is not None:
        original["class_labels"] = pipeline.labels(count, [edit.image_class])
    if edit.image_caption is not None:
        original |= pipeline.encode_captions([edit.image_caption] * count).given()
    x = pipeline.encode(image)
    inversion = invert(model, process, x.expand(count, *x.shape[1:]), **original)
    return pipeline.decode(regenerate(model, process, inversion, **options))
