"""The inputs that a network has, for the page to show, and no others."""

from unet_denoiser.app.form import Inputs, Task
from unet_denoiser.sampling.pipeline.pipeline import Pipeline


def read_inputs(pipeline: Pipeline) -> Inputs:
    """Return the inputs of a pipeline's network."""
    model, data, published = pipeline.model.config, pipeline.data, pipeline.published
    config, kind = pipeline.sampling_config(), data.concat_kind
    classes, captions = tuple(pipeline.class_names or ()), data.text_encoder is not None
    vector = (model.vector_dim or 0) if published is None else 0
    distillation = pipeline.process.distillation
    fixed = "" if distillation is None else distillation.describe()
    is_conditional = bool(classes or captions or vector or kind is not None)
    sees_image = kind is not None and kind.name in ("downscaled", "folder")
    needs = sees_image or (published is not None and published.task in ("inpainting", "translation", "upscaling"))
    size = data.image_size if isinstance(data.image_size, tuple) else model.sizes
    return Inputs(
        classes=classes,
        captions=captions,
        vector=vector,
        is_guided=distillation.draws_guidance if distillation is not None else is_conditional,
        fixed=fixed,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
        sampler=config.sampler,
        needs_image=needs or (kind is not None and kind.name == "inpainting"),
        tasks=_find_tasks(pipeline),
        upscale=kind.factor if kind is not None and kind.name == "downscaled" else None,
        size=tuple(size),
    )


def _find_tasks(pipeline: Pipeline) -> tuple[Task, ...]:
    """Return what a network does with an image."""
    published, kind = pipeline.published, pipeline.data.concat_kind
    if not pipeline.makes_images:
        return ()
    if published is not None and published.task != "generation":
        by_task: dict[str, tuple[Task, ...]] = {
            "inpainting": ("inpaint", "outpaint"),
            "translation": ("translate",),
            "upscaling": ("upscale",),
        }
        return by_task[published.task]
    if kind is not None and kind.name == "inpainting":
        return ("inpaint", "outpaint")
    if kind is not None:
        return ("upscale",) if kind.name == "downscaled" else ("translate",)
    return ("vary", "inpaint", "outpaint", *(("upscale",) if pipeline.data.vae is None else ()))
