"""The reverse process: from noise to data, with any sampler, for any network."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.diffusion.process import Diffusion, accepts_concat
from unet_denoiser.export.engines import Engines
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import SamplingRequest, check_process
from unet_denoiser.sampling.backends import make_engines
from unet_denoiser.sampling.cached_unet import make_cached_unet
from unet_denoiser.sampling.guidance import Guidance, embed_guidance_scale
from unet_denoiser.sampling.samplers import Generators, Sampler
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.device import allow_tf32

Edit = Callable[[Tensor, float], Tensor]


class Step(NamedTuple):
    """One step of the reverse process.

    Args:
        t: its timestep.
        x: (B, C, *spatial) x_t after the step, in the variance-preserving scale whatever the sampler.
        x0: (B, C, *spatial) the x0 predicted in it.
        indices: the samples of the generation that the batch holds.
        residual: (B, C, *spatial) of an inversion only: the error left in the step's equation.
    """

    t: float
    x: Tensor
    x0: Tensor
    indices: slice = slice(None)
    residual: Tensor | None = None


def denoise_step(
    guidance: Guidance,
    sampler: Sampler,
    x: Tensor,
    i: int,
    *,
    x0_estimate: Tensor | None = None,
    edit: Edit | None = None,
    generators: Generators = None,
) -> Step:
    """Do one step of the reverse process: network output, x0, clipping, edit, sampler.

    Args:
        x: (B, C, *spatial) x_t of network call i.
        x0_estimate: (B, C, *spatial), with self-conditioning: the x0 of the step before.
        edit, generators: as for `denoise`.
    """
    config, process, (alpha, sigma) = sampler.config, sampler.process, sampler.alpha_sigma(i)
    with torch.no_grad():
        seen = process.network_input(x, alpha, sigma, x0_estimate)
        output = guidance(seen, sampler.expand_timestep(i, x), (alpha, sigma))
    prediction, variance = process.split(output, x)  # (B, C, *spatial) each
    clip = config.clip_sample and config.dynamic_threshold is None
    x0 = process.predict_x0(prediction, x, alpha, sigma, clip=clip)
    if clip and process.step_rules.keeps_noise and config.sampler == "ddim":  # the x_t of this x0 and the noise found
        x = x + alpha * (x0 - process.predict_x0(prediction, x, alpha, sigma, clip=False))
    if config.dynamic_threshold is not None:
        assert process.data_range is not None  # checked by Sampler
        x0 = apply_dynamic_threshold(x0, config.dynamic_threshold, process.data_range)
    t = sampler.timesteps[i].item()
    x0 = x0 if edit is None else edit(x0, t)
    return Step(t, sampler.step(i, x, x0, variance, generators), x0)


def denoise_steps(
    guidance: Guidance, sampler: Sampler, x: Tensor, *, edit: Edit | None = None, generators: Generators = None
) -> Iterator[Step]:
    """Do all steps of a sampler, from x (B, C, *spatial) at its first noise level."""
    estimate = torch.zeros_like(x) if sampler.process.self_conditioning else None
    for i in range(len(sampler)):
        step = denoise_step(guidance, sampler, x, i, x0_estimate=estimate, edit=edit, generators=generators)
        if estimate is not None:
            estimate = sampler.process.clip(step.x0)  # as in training, whatever clip_sample
        x = step.x
        yield step


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Diffusion,
    x: Tensor,
    config: SamplingConfig | None = None,
    *,
    first_step: int = 0,
    edit: Edit | None = None,
    generators: Generators = None,
    **options: Any,
) -> Iterator[Step]:
    """Run the reverse process from pure noise, one step at a time.

    Args:
        predict: (input, time (B,)) -> the network's output, such as a `Guidance`. The input is c_in x_t (B, C, ...),
            x_t itself for the path "vp"; with self-conditioning, followed by the x0 of the step before (zero in the
            first).
        x: (B, C, ...) drawn from N(0, 1), in float32; with `first_step`, x_t at that step's noise level.
        config, options: how to sample; options are fields of `SamplingConfig`, which override `config`.
        first_step: the step to begin with, 0 to `num_inference_steps` - 1.
        edit: (x0, t) -> x0, changes each predicted x0 before the sampler sees it.
        generators: one per sample, for samplers that draw noise.

    Yields:
        A `Step` for every network call; the x of the last one is the result.
    """
    sampler = Sampler(replace(config or SamplingConfig(), **options), process, first_step)
    guidance = predict if isinstance(predict, Guidance) else Guidance(predict)
    yield from denoise_steps(guidance, sampler, x, edit=edit, generators=generators)


def apply_dynamic_threshold(x0: Tensor, percentile: float, data_range: tuple[float, float]) -> Tensor:
    """Clip each x0 to a percentile of its absolute values, if that exceeds the data's range, and scale it to the range.

    Saharia et al. 2022 (Imagen), section 2.3.
    """
    values, bound = x0.flatten(1).abs(), data_range[1]  # (B, numel)
    largest = values.kthvalue(max(1, math.ceil(percentile * values.shape[1])), dim=1).values
    largest = append_dims(largest.clamp_min(bound), x0.ndim)
    return x0.clamp(-largest, largest) * (bound / largest)


def sample(
    model: UNet,
    process: Diffusion,
    *,
    seeds: Sequence[int] | int,
    on_step: Callable[[Step], object] | None = None,
    **request: Any,
) -> Tensor:
    """Generate one sample per seed; sample i depends on seed i and its conditions alone, not on the batch.

    Args:
        model: runs in evaluation mode and is left in the mode it was in.
        seeds: any integers that torch.Generator takes, or a single one; noise is drawn on the CPU in float32.
        on_step: called after every step of every batch, for progress bars and previews.
        config: how to sample; fields of `SamplingConfig` given as keywords override it.
        class_labels, vector, context, context_mask, time_cond, concat: the conditions, see `Conditions`, with one
            sample per seed, or None. Lists and arrays are taken too, and a single label for all samples.
        image_size: size of the samples, one int or one per axis (default: the size of `concat`, else of `start`, else
            the network's).
        batch_size: samples per network call.
        start: where to start, if not from pure noise.
        edit: (x0, t, indices) -> x0, changes the predicted x0 of seeds[indices] before the sampler sees it.
        guided, negative, guide, classifier, classifier_scale: see `Guidance`. `negative` has one sample per seed, or
            one for all. `guide` is a network of the same process and conditions, such as an earlier checkpoint. With a
            classifier, conditions that the network was not built for go to the classifier alone.
        loop: runs the steps of a batch in place of `denoise_steps`, with the same arguments.

    Returns:
        (len(seeds), C, *spatial) float32 on the model's device.

    Raises:
        ValueError: conditions that do not match the seeds, or options that cannot work; before any sampling.
    """
    results = {}
    for step in sample_steps(model, process, seeds=seeds, **request):
        if on_step is not None:
            on_step(step)
        results[step.indices.start] = step.x
    return torch.cat(list(results.values()))


def sample_steps(model: UNet, process: Diffusion, *, seeds: Sequence[int] | int, **request: Any) -> Iterator[Step]:
    """Yield the steps of `sample`, batch after batch; `indices` tells which samples they are.

    Raises:
        ValueError: as `sample`; at the call, but for errors of guidance, which come with the first step.
    """
    check_process(process)
    parsed = SamplingRequest.parse(seeds, request, **process.sampling_defaults)
    shape = parsed.check(model, process)
    sampler = Sampler(parsed.config, process, 0 if parsed.start is None else parsed.start.first_step)
    return _run_batches(model, sampler, parsed, shape)


def _run_batches(model: UNet, sampler: Sampler, request: SamplingRequest, shape: tuple[int, ...]) -> Iterator[Step]:
    """Run all batches with one sampler; a sample has shape `shape`."""
    run, device = request.loop or denoise_steps, model.device
    allow_tf32(device.type)
    with _evaluation_mode(model, request.guide):
        engines = {unet: make_engines(unet, sampler, request, shape) for unet in (model, request.guide) if unet}
        for first in range(0, len(request.seeds), request.batch_size):
            indices = slice(first, min(first + request.batch_size, len(request.seeds)))
            generators = [torch.Generator().manual_seed(int(seed)) for seed in request.seeds[indices]]
            x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # (B, C, *spatial)
            if request.start is not None:
                start, (alpha, sigma) = request.start.x[indices].to(x), sampler.alpha_sigma(0)
                x = alpha * start + sigma * x if request.start.add_noise else start  # DDPM, equation 4
            guidance = _make_guidance(model, sampler, request, indices, engines)
            edit = None if request.edit is None else partial(_edit, request.edit, indices)
            for step in run(guidance, sampler, x, edit=edit, generators=generators):
                yield step._replace(indices=indices)


def _edit(edit: Callable[[Tensor, float, slice], Tensor], indices: slice, x0: Tensor, t: float) -> Tensor:
    return edit(x0, t, indices)


def _make_guidance(
    model: UNet,
    sampler: Sampler,
    request: SamplingRequest,
    indices: slice,
    engines: Mapping[UNet, Engines | None],
) -> Guidance:
    """Make the guidance of one batch, with networks that share work among the batch's calls."""
    config, process = request.config, sampler.process
    conditions, negative = (
        values.rows(indices).to(model.device, model.dtype) for values in (request.conditions, request.negative)
    )
    classifier, guided = request.classifier, request.guided
    if classifier is not None:  # conditions that the network was not built for are the classifier's alone
        known = (*model.config.conditions, "concat", *["time_cond"] * (model.config.time_cond_dim is not None))
        classifier = partial(classifier, **conditions.without(known).given())
        conditions, negative = (Conditions.select(values.given(), known) for values in (conditions, negative))
        guided = guided if guided is None else [name for name in guided if name in known]
    if process.distillation is not None and process.distillation.draws_guidance:
        scales = torch.full((indices.stop - indices.start,), config.guidance_scale, device=model.device)
        time_cond = embed_guidance_scale(scales, model.config.time_cond_dim or 0)
        conditions, config = replace(conditions, time_cond=time_cond), replace(config, guidance_scale=1.0)

    def network(unet: UNet) -> Callable[..., Tensor]:
        options: Any = {"reuse": config.reuse, "compile": config.compile, "engines": engines[unet]}
        return accepts_concat(make_cached_unet(unet, sampler.timesteps, **options))

    return Guidance(
        network(model),
        config,
        conditions,
        guided=guided,
        negative=negative,
        guide=None if request.guide is None else network(request.guide),
        classifier=classifier,
        classifier_scale=request.classifier_scale,
        prediction_type=process.prediction_type,
        sigma_data=process.sigma_data,
        channels=process.data_channels(model.config),
    )


@contextmanager
def _evaluation_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put networks into evaluation mode, and back into their own mode at the end."""
    was_training = {model: model.training for model in models if model is not None}
    try:
        for model in was_training:
            model.eval()
        yield
    finally:
        for model, training in was_training.items():
            model.train(training)
