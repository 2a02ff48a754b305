"""The reverse process: from noise to data, with any sampler, for any network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import CONDITIONS
from unet_denoiser.diffusion.process import Diffusion, accepts_concat, self_conditioned_input
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import (
    Start,
    check_channels,
    check_request,
    check_rows,
    expanded,
    given_concat,
    known_inputs,
    read_options,
)
from unet_denoiser.sampling.cached_unet import make_cached_unet
from unet_denoiser.sampling.guidance import Guidance
from unet_denoiser.sampling.samplers import Sampler


class Step(NamedTuple):
    """One step of the reverse process: its timestep, x after it and the x0 predicted in it, both (B, C, *spatial).

    Args:
        rows: which of all samples they are.
    """

    t: float
    x: Tensor
    x0: Tensor
    rows: slice = slice(None)


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    process: Diffusion,
    x: Tensor,
    config: SamplingConfig | None = None,
    *,
    first_step: int = 0,
    edit: Callable[[Tensor, float], Tensor] | None = None,
    generators: list[torch.Generator] | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Run the reverse process from pure noise, one step at a time.

    Args:
        predict: (input, t (B,)) -> the network's output; `Guidance` is one. The input is x_t (B, C, ...), with
            self-conditioning followed by the x0 of the step before (zero in the first).
        x: (B, C, ...) draw from N(0, 1), in float32; with `first_step`, x_t at that step's noise level.
        config, options: how; the options are `SamplingConfig`'s, and go before it.
        first_step: the step to begin with, from 0 to `num_inference_steps` - 1.
        edit: (x0, t) -> x0, what becomes of every predicted x0 before the sampler sees it.
        generators: one per sample, for the samplers that draw noise on the way (ddpm).

    Yields:
        A `Step` for every call of the network; the last one's x is the result. Its x is x_t in the process's scale,
        whatever the sampler.
    """
    config = replace(config or SamplingConfig(), **options)
    _check_threshold(config, process)
    guidance = predict if isinstance(predict, Guidance) else Guidance(predict)
    sampler = Sampler(config, process, first_step)
    estimate = torch.zeros_like(x) if process.self_conditioning else None
    timesteps = sampler.timesteps.to(x.device)  # all at once: torch waits for each copy to a GPU
    for i in range(len(sampler)):
        level = sampler.noise_level(i)
        with torch.no_grad():
            output = guidance(self_conditioned_input(x, estimate), timesteps[i].expand(len(x)), level)
        prediction, variance = process.split(output, x)
        x0 = process.predict_x0(prediction, x, *level, clip=config.clip_sample and config.dynamic_threshold is None)
        if config.dynamic_threshold is not None:
            x0 = dynamically_thresholded(x0, config.dynamic_threshold, process.data_range or (-1, 1))
        t = sampler.timesteps[i].item()
        if edit is not None:
            x0 = edit(x0, t)
        if estimate is not None:
            estimate = process.clip(x0)  # as in training, whatever clip_sample
        x = sampler.step(i, x, x0, variance, generators)
        yield Step(t, x, x0)


def dynamically_thresholded(x0: Tensor, percentile: float, data_range: tuple[float, float]) -> Tensor:
    """Each x0 clipped to a percentile of its absolute values, where that exceeds the data's range, and scaled to it.

    Saharia et al. 2022, section 2.3.
    """
    values, bound = x0.flatten(1).abs(), data_range[1]
    largest = values.kthvalue(max(1, math.ceil(percentile * values.shape[1])), dim=1).values.clamp_min(bound)
    largest = largest.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-largest, largest) * (bound / largest)


def _check_threshold(config: SamplingConfig, process: Diffusion) -> None:
    if config.dynamic_threshold is not None and process.data_range is None:
        raise ValueError(
            f"dynamic_threshold={config.dynamic_threshold} needs data of a known range, and this process has none "
            "(clip_sample_range=None, as latents); leave it out"
        )


def sample(
    model: UNet,
    process: Diffusion,
    *,
    seeds: Sequence[int],
    on_step: Callable[[Step], object] | None = None,
    **request: Any,
) -> Tensor:
    """Generate one sample per seed; sample i depends on seed i and its conditions alone, not on the batch.

    Args:
        model: runs in evaluation mode and is left in the mode it was in.
        seeds: any integers that torch.Generator takes; noise is drawn on the CPU in float32.
        image_size: size of the samples, one int or one per axis (default: that of `concat`, else that of `start`, else
            the configuration's).
        batch_size: samples per call of the network.
        on_step: called after every step of every batch, for progress bars and previews.
        config: how samples are made.
        start: where to start, if not from pure noise.
        edit: (x0, t, rows) -> x0, what becomes of the predicted x0 of the seeds[rows] before the sampler sees them.
        loop: called as `denoise` is, in its place.
        negative, guide, classifier, classifier_scale, guided: see `Guidance`. `negative` has one row per seed, or one
            for all; `guide` is a network of the same process and conditions, such as an earlier checkpoint; with a
            classifier, conditions that the network does not know are the classifier's alone.
        others: fields of `SamplingConfig`, which go before `config`; and conditions, `class_labels`,
            `vector`, `context`, `context_mask`, each with one row per seed, or None, and `concat` (B, C2, *spatial)
            for a network that was trained with it.

    Returns:
        (len(seeds), C, *spatial) float32 on the model's device.

    Raises:
        ValueError: conditions that do not match the seeds, or options that cannot work; before any sampling.
    """
    results = {}
    for step in sample_steps(model, process, seeds=seeds, **request):
        if on_step is not None:
            on_step(step)
        results[step.rows.start] = step.x
    return torch.cat(list(results.values()))


def sample_steps(
    model: UNet,
    process: Diffusion,
    *,
    seeds: Sequence[int],
    image_size: int | Sequence[int] | None = None,
    batch_size: int = 64,
    config: SamplingConfig | None = None,
    start: Start | None = None,
    edit: Callable[[Tensor, float, slice], Tensor] | None = None,
    loop: Callable[..., Iterator[Step]] = denoise,
    negative: Mapping[str, Tensor | None] | None = None,
    guide: UNet | None = None,
    classifier: Callable[..., Tensor] | None = None,
    classifier_scale: float = 1.0,
    guided: Sequence[str] | None = None,
    **options_and_conditions: Any,
) -> Iterator[Step]:
    """The steps of `sample` as they are done, batch after batch; arguments as there, and `rows` says which samples.

    Raises:
        ValueError: as `sample`, when it is called, or for what only guidance can tell, at the first step.
    """
    config, given = read_options(config, options_and_conditions)
    opposite = expanded(negative, len(seeds))
    sizes = check_request(model, seeds, image_size, batch_size, given, start)
    check_rows("negative", opposite, len(seeds))
    _check_threshold(config, process)
    channels = check_channels(model, process, given_concat(given))
    if guide is not None and check_channels(guide, process, given_concat(given)) != channels:
        raise ValueError(f"guide makes {guide.config.out_channels} channels; the network {model.config.out_channels}")
    if classifier is not None and (guide is None or guided is not None):
        guided = [name for name in guided or given if name in known_inputs(model) and name in (*CONDITIONS, "concat")]
    if start is not None and start.x.shape[1] != channels:
        raise ValueError(f"start has {start.x.shape[1]} channels; the samples have {channels}")
    sampler = Sampler(config, process, 0 if start is None else start.first_step)
    device = model.input_conv.weight.device
    if config.reuse is not None and loop is not denoise:
        raise ValueError(f"reuse={config.reuse} does not go with resampling and inversion, which repeat their steps")

    def put(values: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
        return {
            name: value[rows].to(device, model.dtype if value.is_floating_point() else None)
            for name, value in values.items()
        }

    def network(model: UNet) -> Callable[..., Tensor]:
        fast = make_cached_unet(model, sampler.timesteps, reuse=config.reuse, compile=config.compile)
        return accepts_concat(fast if classifier is None else _only_known(fast, model))

    def steps() -> Iterator[Step]:
        with _evaluating(model), _evaluating(guide):
            for first in range(0, len(seeds), batch_size):
                rows = slice(first, min(first + batch_size, len(seeds)))
                generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[rows]]
                x = torch.stack([torch.randn(channels, *sizes, generator=g) for g in generators]).to(device)
                if start is not None:
                    x = _started(start, x, sampler, rows)
                guidance = Guidance(
                    network(model),
                    config,
                    put(given, rows),
                    guided=guided,
                    negative=put(opposite, rows),
                    guide=None if guide is None else network(guide),
                    classifier=classifier,
                    classifier_scale=classifier_scale,
                    prediction_type=process.prediction_type,
                    channels=channels,
                )
                for step in loop(
                    guidance,
                    process,
                    x,
                    config,
                    first_step=0 if start is None else start.first_step,
                    edit=None if edit is None else partial(_edited, edit, rows),
                    generators=generators,
                ):
                    yield step._replace(rows=rows)

    return steps()


def _only_known(network: Callable[..., Tensor], model: UNet) -> Callable[..., Tensor]:
    """The network without the conditions that its model was not built for: a classifier's alone."""
    known = known_inputs(model) | {"drop"}
    return lambda x, t, **inputs: network(x, t, **{name: inputs[name] for name in inputs if name in known})


def _started(start: Start, noise: Tensor, sampler: Sampler, rows: slice) -> Tensor:
    """x_t of the first step."""
    x = start.x[rows].to(noise)
    alpha, sigma = sampler.noise_level(0)
    return alpha * x + sigma * noise if start.add_noise else x


def _edited(edit: Callable[[Tensor, float, slice], Tensor], rows: slice, x0: Tensor, t: float) -> Tensor:
    return edit(x0, t, rows)


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    if model is None:
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
