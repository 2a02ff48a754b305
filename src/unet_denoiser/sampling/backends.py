"""The choice of a backend for a sampling: torch, or the network in an engine."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export.engines import Engines
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import SamplingRequest
from unet_denoiser.sampling.calibration import calibrate
from unet_denoiser.sampling.samplers import Sampler


def make_engines(model: UNet, sampler: Sampler, request: SamplingRequest, shape: tuple[int, ...]) -> Engines | None:
    """Return the engines that a request asks for; None for torch.

    Args:
        shape: of one sample.
    """
    config = request.config
    if config.backend in ("torch", "auto"):
        return None
    calibration = None
    if config.backend_precision == "int8":
        calibration = partial(calibrate_step, model, sampler.process, shape[1:], request.conditions)
    return Engines(model, config.backend, config.backend_precision, calibration)


def calibrate_step(
    model: UNet, process: Diffusion, sizes: tuple[int, ...], conditions: Conditions
) -> list[dict[str, Tensor]]:
    """Return inputs of the step "full" of an engine, at all noise levels."""
    recorded, inputs = calibrate(model, process, sizes, conditions), []
    with torch.no_grad():
        for call in recorded.calls:
            given = dict(call.given)
            concat, time_cond = given.pop("concat", None), given.pop("time_cond", None)
            x = call.x if concat is None else torch.cat([call.x, concat], dim=1)
            terms, context = model.embed_conditions(len(x), Conditions(**given), call.drop)
            emb = sum(terms, start=model.embed_time(call.t, time_cond))
            step = {"x": x, "emb": emb}
            if context is not None:
                mask = context.mask
                mask = torch.ones(context.tokens.shape[:2], dtype=torch.bool) if mask is None else mask
                step |= {"tokens": context.tokens, "mask": mask}
            inputs.append(step)
    return inputs
