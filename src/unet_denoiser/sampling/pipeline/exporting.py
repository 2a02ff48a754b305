"""The export of a pipeline's network, with what its README needs: steps, names, an example's conditions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from unet_denoiser.config.export import ExportConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export.exporter import ExportReport, ExportRequest, export_network
from unet_denoiser.export.readme import Subject
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.calibration import Call, calibrate
from unet_denoiser.sampling.guidance import embed_guidance_scale
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.samplers import select_steps

_EXAMPLES = 4  # samples in the example's conditions
_EXAMPLE_CAPTION = "a photo"


def export_pipeline(pipeline: Pipeline, out: Path, config: ExportConfig | None = None) -> ExportReport:
    """Export the network of a pipeline to a new folder, with its schedule, an example and a README.

    `image_size` is in pixels. The errors are those of `export_network`.
    """
    config = config or ExportConfig()
    model, process = pipeline.model, pipeline.process
    if config.image_size is not None:
        size = pipeline.sample_size(config.image_size)
        config = ExportConfig(config.to, config.precision, size, config.batch_size)
    sampling = pipeline.sampling_config(sampler="ddim")
    times, _ = select_steps(sampling, process)
    example, negative = _find_example(pipeline)
    guided = bool(negative) or (model.config.learned_null and bool(model.config.conditions))
    scale = sampling.guidance_scale if sampling.guidance_scale != 1 else 2.0
    data = pipeline.data
    subject = Subject(
        name=pipeline.path.resolve().name,
        class_names=tuple(pipeline.class_names or ()),
        text_encoder=data.text_encoder,
        vae=data.vae,
        guidance_scale=scale if guided else 1.0,
        negative=tuple(negative),
    )
    space = config.image_size or model.config.sizes
    sizes = space * (model.config.dims if len(space) == 1 else 1)
    recorded = calibrate(model, process, sizes, Conditions(**example)) if config.precision == "int8" else None
    table = process.times.double().numpy()
    request = ExportRequest(
        model,
        process,
        steps=[int(abs(table - time).argmin()) for time in times],
        clip_sample=sampling.clip_sample,
        example=example | {f"negative_{name}": value for name, value in negative.items()},
        calibration=None if recorded is None else [_as_inputs(call, model, process) for call in recorded.calls],
        samples=None if recorded is None else recorded.samples,
        subject=subject,
        tokens=data.caption_length if data.text_encoder else None,
    )
    return export_network(request, out, config)


def _as_inputs(call: Call, model: UNet, process: Diffusion) -> dict[str, Tensor]:
    """Return a recorded call as the inputs of an exported network."""
    inputs, channels = {"t": call.t.float()} | call.given, process.data_channels(model.config)
    inputs["x"] = call.x[:, :channels]
    if process.self_conditioning:
        inputs["x0_estimate"] = call.x[:, channels:]
    if "context" in inputs and "context_mask" not in inputs:
        inputs["context_mask"] = torch.ones(inputs["context"].shape[:2], dtype=torch.bool)
    if model.config.learned_null:
        keep = torch.zeros(len(call.x), dtype=torch.bool)
        inputs |= {f"drop_{name}": call.drop.get(name, keep) for name in model.config.conditions}
    return inputs


def _find_example(pipeline: Pipeline) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the conditions of a few samples, and those that guidance leads away from where no null was learned."""
    config, process = pipeline.model.config, pipeline.process
    conditions, negative = Conditions(), Conditions()
    if pipeline.data.text_encoder is not None and config.context_dim:
        conditions = pipeline.encode_captions([_EXAMPLE_CAPTION])
        negative = pipeline.encode_absence(conditions)
    given = conditions.given()
    if config.num_classes:
        given["class_labels"] = torch.arange(_EXAMPLES) % config.num_classes
    if config.time_cond_dim and process.distillation is not None and process.distillation.draws_guidance:
        scale = torch.full((1,), float(process.sampling_defaults["guidance_scale"]))
        given["time_cond"] = embed_guidance_scale(scale, config.time_cond_dim)
    return given, negative.given()
