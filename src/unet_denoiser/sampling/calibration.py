"""Calls of a network at all noise levels, on samples of its own: what quantisation measures its ranges on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.input_checks import condition_shapes
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.samplers import Sampler

NUM_SAMPLES, NUM_STEPS, NUM_LEVELS = 8, 12, 16
_TOKENS = 8


class Call(NamedTuple):
    """One call of a network: x (B, C, *spatial) with its own channels alone, and all else by name."""

    x: Tensor
    t: Tensor
    given: dict[str, Tensor]
    drop: dict[str, Tensor]


class Calibration(NamedTuple):
    """The calls, and the samples x0 (N, C, *spatial) that they lead to."""

    calls: list[Call]
    samples: Tensor


def calibrate(
    model: UNet,
    process: Diffusion,
    sizes: Sequence[int],
    conditions: Conditions | None = None,
    count: int = NUM_SAMPLES,
) -> Calibration:
    """Sample a few images and record the calls; then call the network on them at evenly spaced noise levels.

    Half of the samples go without conditions, where the network has learned to.

    Args:
        sizes: of the samples.
        conditions: of one sample or more; those that are not given are drawn.
    """
    generator, device = torch.Generator().manual_seed(0), model.device
    given = _complete(model, process, conditions or Conditions(), sizes, count=count, generator=generator)
    drop = {}
    if model.config.learned_null:
        half = torch.arange(count, device=device) % 2 == 1
        drop = {name: half for name in model.config.conditions if name in given}
    options: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": NUM_STEPS} | process.sampling_defaults
    sampler = Sampler(SamplingConfig(**options), process)
    x = torch.randn(count, process.data_channels(model.config), *sizes, generator=generator).to(device)
    estimate, calls = torch.zeros_like(x) if process.self_conditioning else None, []
    with torch.no_grad():
        for i in range(len(sampler)):
            alpha, sigma = sampler.alpha_sigma(i)
            call = Call(process.network_input(x, alpha, sigma, estimate), sampler.expand_timestep(i, x), given, drop)
            calls.append(call)
            output, _ = process.split(_run(model, call), x)
            x0 = process.predict_x0(output, x, alpha, sigma)
            estimate = x0 if estimate is not None else None
            x = sampler.step(i, x, x0)
        samples = process.clip(x)
        for k in np.linspace(0, process.num_train_timesteps - 1, NUM_LEVELS).round().astype(int):
            t = torch.full((count,), int(k), device=device)
            noisy = process.add_noise(samples, torch.randn(samples.shape, generator=generator).to(device), t)
            seen = process.network_input(noisy, *process.alpha_sigma(t, noisy), estimate)
            calls.append(Call(seen, process.time(t), given, drop))
    return Calibration(calls, samples)


def _run(model: UNet, call: Call) -> Tensor:
    given = dict(call.given)
    concat = given.pop("concat", None)
    x = call.x if concat is None else torch.cat([call.x, concat], dim=1)
    return model(x.to(model.dtype), call.t, **given, drop=call.drop).float()


def _complete(
    model: UNet, process: Diffusion, known: Conditions, sizes: Sequence[int], *, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return all conditions that a network takes, for `count` samples; draw those that are not known."""
    config, found = model.config, known.given()
    names = [*config.conditions, *["time_cond"] * (config.time_cond_dim is not None)]
    complete = {}
    for name in names:
        shape = [_TOKENS if n is None else n for n in condition_shapes(config, count)[name]]
        if name in found:
            complete[name] = found[name][torch.arange(count) % len(found[name])]
        elif name == "class_labels":
            complete[name] = torch.randint(0, config.num_classes or 1, shape, generator=generator)
        else:
            complete[name] = torch.randn(shape, generator=generator)
    if "context_mask" in found and "context" in found:
        complete["context_mask"] = found["context_mask"][torch.arange(count) % len(found["context_mask"])]
    if (channels := process.concat_channels(config)) > 0:
        image = found.get("concat")
        fits = image is not None and tuple(image.shape[2:]) == tuple(sizes)
        drawn = torch.randn(count, channels, *sizes, generator=generator)
        complete["concat"] = image[torch.arange(count) % len(image)] if image is not None and fits else drawn
    return {name: value.to(model.device) for name, value in complete.items()}
