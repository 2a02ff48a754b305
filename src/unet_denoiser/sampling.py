"""The reverse process: from noise to data, with any sampler, for any network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unet_denoiser.config import UNetConfig
from unet_denoiser.diffusion import Diffusion, network_input
from unet_denoiser.guidance import Guidance
from unet_denoiser.inputs import CONDITIONS, with_concat
from unet_denoiser.recipe_sampling import SamplingConfig
from unet_denoiser.samplers import Sampler
from unet_denoiser.unet import UNet

INPUTS = (*CONDITIONS, "context_mask", "time_cond", "concat")  # what a network is given beside x and t, row by row


class Step(NamedTuple):
    """One step of the reverse process: its timestep, x after it and the x0 predicted in it, both (B, C, *spatial).

    Args:
        rows: which of all samples they are.
    """

    t: float
    x: Tensor
    x0: Tensor
    rows: slice = slice(None)


class Start(NamedTuple):
    """Where the reverse process starts, if not from pure noise.

    Args:
        x: (N, C, *spatial), one per seed: data, which are noised to the level of the first step, or x_t itself.
        first_step: the step to begin with, from 0 to `num_inference_steps` - 1.
        add_noise: False where x is x_t, at that step's noise level already.
    """

    x: Tensor
    first_step: int = 0
    add_noise: bool = True


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
    sampler = Sampler(config, process, first_step)
    estimate = torch.zeros_like(x) if process.self_conditioning else None
    timesteps = sampler.timesteps.to(x.device)  # all at once: torch waits for each copy to a GPU
    for i in range(len(sampler)):
        with torch.no_grad():
            output = predict(network_input(x, estimate), timesteps[i].expand(len(x)))
        prediction, variance = process.split(output, x)
        x0 = process.predict_x0(prediction, x, *sampler.noise_level(i), config.clip_sample)
        t = sampler.timesteps[i].item()
        if edit is not None:
            x0 = edit(x0, t)
        if estimate is not None:
            estimate = process.clip(x0)  # as in training, whatever clip_sample
        x = sampler.step(i, x, x0, variance, generators)
        yield Step(t, x, x0)


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
        guided: see `Guidance`.
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
    guided: Sequence[str] | None = None,
    **options_and_conditions: Any,
) -> Iterator[Step]:
    """The steps of `sample` as they are done, batch after batch; arguments as there, and `rows` says which samples.

    Raises:
        ValueError: as `sample`, when it is called.
    """
    config, given = _read_options(config, options_and_conditions)
    sizes = _check_request(model, seeds, image_size, batch_size, given, start)
    channels = _check_channels(model, process, _concat_channels(given))
    sampler = Sampler(config, process, 0 if start is None else start.first_step)
    device = model.input_conv.weight.device

    def network(x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
        return model(x.to(model.dtype), t, **inputs).float()

    def steps() -> Iterator[Step]:
        with _evaluating(model):
            for first in range(0, len(seeds), batch_size):
                rows = slice(first, min(first + batch_size, len(seeds)))
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[rows]]
                x = torch.stack([torch.randn(channels, *sizes, generator=g) for g in generators]).to(device)
                if start is not None:
                    x = _started(start, x, sampler, rows)
                inputs = {
                    name: value[rows].to(device, model.dtype if value.is_floating_point() else None)
                    for name, value in given.items()
                }
                for step in loop(
                    Guidance(with_concat(network), config, inputs, guided=guided, channels=channels),
                    process,
                    x,
                    config,
                    first_step=0 if start is None else start.first_step,
                    edit=None if edit is None else partial(_edited, edit, rows),
                    generators=generators,
                ):
                    yield step._replace(rows=rows)

    return steps()


def _read_options(config: SamplingConfig | None, given: Mapping[str, Any]) -> tuple[SamplingConfig, dict[str, Tensor]]:
    """The keywords of `sample` as its configuration and its conditions."""
    options = {field.name for field in fields(SamplingConfig)}
    if unknown := [name for name in given if name not in options and name not in INPUTS]:
        raise ValueError(
            f"{unknown[0]} is neither a condition ({', '.join(INPUTS)}) nor an option ({', '.join(sorted(options))})"
        )
    return config_of(config, dict(given)), {name: given[name] for name in INPUTS if given.get(name) is not None}


def config_of(config: SamplingConfig | None, options: dict[str, Any], **defaults: Any) -> SamplingConfig:
    """The configuration with those options that are its fields, which are taken out of `options`."""
    names = [field.name for field in fields(SamplingConfig) if field.name in options]
    return replace(config or SamplingConfig(**defaults), **{name: options.pop(name) for name in names})


def _started(start: Start, noise: Tensor, sampler: Sampler, rows: slice) -> Tensor:
    """x_t of the first step."""
    x = start.x[rows].to(noise)
    alpha, sigma = sampler.noise_level(0)
    return alpha * x + sigma * noise if start.add_noise else x


def _edited(edit: Callable[[Tensor, float, slice], Tensor], rows: slice, x0: Tensor, t: float) -> Tensor:
    return edit(x0, t, rows)


def _check_request(
    model: UNet,
    seeds: Sequence[int],
    image_size: int | Sequence[int] | None,
    batch_size: int,
    conditions: dict[str, Tensor],
    start: Start | None,
) -> tuple[int, ...]:
    """The size of the samples, one int per axis, after everything that was asked for has been checked."""
    config = model.config
    concat = conditions.get("concat")
    like = concat if concat is not None or start is None else start.x
    natural = config.image_size if like is None else tuple(like.shape[2:])
    sizes = natural if image_size is None else image_size
    sizes = (sizes,) * config.dims if isinstance(sizes, int) else tuple(sizes)
    if len(sizes) != config.dims or min(sizes) < 1:
        raise ValueError(f"image_size={image_size} must be a positive int, or {config.dims} of them")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not len(seeds):
        raise ValueError("seeds is empty; give one per sample")
    for name, value in conditions.items():
        if len(value) != len(seeds):
            raise ValueError(f"{name} has {len(value)} rows for {len(seeds)} seeds; give one row per seed")
    if concat is not None and tuple(concat.shape[2:]) != sizes:
        raise ValueError(f"concat has size {tuple(concat.shape[2:])}; the samples have {sizes}")
    if start is not None and (len(start.x), *start.x.shape[2:]) != (len(seeds), *sizes):
        raise ValueError(f"start has shape {tuple(start.x.shape)}; there are {len(seeds)} seeds of size {sizes}")
    return sizes


def _check_channels(model: UNet, process: Diffusion, concat: int) -> int:
    """The channels of the samples; ValueError for a network of another process, or another number to concatenate."""
    count, needed = data_channels(model.config, process), concat_channels(model.config, process)
    if 0 <= needed != concat:
        perhaps = ", or for self_conditioning=True" if needed == count and not process.self_conditioning else ""
        raise ValueError(f"concat has {concat} channels; this network was built for {needed}{perhaps}")
    return process.check_channels(model.config, concat_channels=concat)


def data_channels(config: UNetConfig, process: Diffusion) -> int:
    """The channels of a network's samples."""
    return config.out_channels // (2 if process.learns_variance else 1)


def concat_channels(config: UNetConfig, process: Diffusion) -> int:
    """The channels that a network takes beside the noisy sample."""
    return config.in_channels - process.channels(data_channels(config, process))["in_channels"]


def _concat_channels(conditions: dict[str, Tensor]) -> int:
    return conditions["concat"].shape[1] if "concat" in conditions else 0


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
