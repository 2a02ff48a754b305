"""What is asked of a sampling: read, and checked before any work starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import CONDITIONS
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.unet import UNet

INPUTS = (*CONDITIONS, "context_mask", "time_cond", "concat")  # what a network is given beside x and t, row by row


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


def config_of(config: SamplingConfig | None, options: dict[str, Any], **defaults: Any) -> SamplingConfig:
    """The configuration with those options that are its fields, which are taken out of `options`."""
    names = [field.name for field in fields(SamplingConfig) if field.name in options]
    return replace(config or SamplingConfig(**defaults), **{name: options.pop(name) for name in names})


def read_options(config: SamplingConfig | None, given: Mapping[str, Any]) -> tuple[SamplingConfig, dict[str, Tensor]]:
    """The keywords of `sample` as its configuration and its conditions."""
    options = {field.name for field in fields(SamplingConfig)}
    if unknown := [name for name in given if name not in options and name not in INPUTS]:
        raise ValueError(
            f"{unknown[0]} is neither a condition ({', '.join(INPUTS)}) nor an option ({', '.join(sorted(options))})"
        )
    return config_of(config, dict(given)), {name: given[name] for name in INPUTS if given.get(name) is not None}


def expanded(negative: Mapping[str, Tensor | None] | None, count: int) -> dict[str, Tensor]:
    """Negative conditions with a row per seed, where there is one for all."""
    given = {name: value for name, value in (negative or {}).items() if value is not None}
    return {name: value.expand(count, *value.shape[1:]) if len(value) == 1 else value for name, value in given.items()}


def check_request(
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
    check_rows("", conditions, len(seeds))
    if concat is not None and tuple(concat.shape[2:]) != sizes:
        raise ValueError(f"concat has size {tuple(concat.shape[2:])}; the samples have {sizes}")
    if start is not None and (len(start.x), *start.x.shape[2:]) != (len(seeds), *sizes):
        raise ValueError(f"start has shape {tuple(start.x.shape)}; there are {len(seeds)} seeds of size {sizes}")
    return sizes


def check_rows(where: str, conditions: Mapping[str, Tensor], count: int) -> None:
    for name, value in conditions.items():
        if len(value) != count:
            name = f"{where} {name}".strip()
            raise ValueError(f"{name} has {len(value)} rows for {count} seeds; give one row per seed")


def check_channels(model: UNet, process: Diffusion, concat: int) -> int:
    """The channels of the samples; ValueError for a network of another process, or another number to concatenate."""
    count, needed = process.data_channels(model.config), process.concat_channels(model.config)
    if 0 <= needed != concat:
        perhaps = ", or for self_conditioning=True" if needed == count and not process.self_conditioning else ""
        raise ValueError(f"concat has {concat} channels; this network was built for {needed}{perhaps}")
    return process.check_channels(model.config, concat_channels=concat)


def given_concat(conditions: dict[str, Tensor]) -> int:
    return conditions["concat"].shape[1] if "concat" in conditions else 0


def known_inputs(model: UNet) -> set[str]:
    """The inputs that a network was built for."""
    options = CONDITIONS | {"context_mask": "context_dim", "time_cond": "time_cond_dim"}
    return {"concat"} | {name for name, option in options.items() if getattr(model.config, option) is not None}
