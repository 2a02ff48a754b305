"""The choice of a backend for a sampling: torch, or the network in an engine."""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.export.engines import Engines
from unet_denoiser.export.libraries import is_installed
from unet_denoiser.export.network import AXES
from unet_denoiser.export.steps import Entry, NetworkStep, draw_step_inputs
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import SamplingRequest
from unet_denoiser.sampling.calibration import calibrate
from unet_denoiser.sampling.samplers import Sampler

CONVERSION_SECONDS = 20.0  # of a small network, tracing, converting and compiling; docs/results/backends.md
MIN_LARGE_BATCH = 8
MIN_WIDE_CHANNELS = 128  # from here on torch's side has Winograd's filtering, which is as fast with large batches


def make_engines(model: UNet, sampler: Sampler, request: SamplingRequest, shape: tuple[int, ...]) -> Engines | None:
    """Return the engines that a request asks for; None for torch.

    Args:
        shape: of one sample.
    """
    config = request.config
    name = _choose(model, sampler, request, shape) if config.backend == "auto" else config.backend
    if name == "torch":
        return None
    calibration = None
    if config.backend_precision == "int8":
        calibration = partial(calibrate_step, model, sampler.process, shape[1:], request.conditions)
    return Engines(model, name, config.backend_precision, calibration)


def saved_share(channels: int, batch: int) -> float:
    """Return the share of time that OpenVINO saves in float32: the least measured (docs/results/backends.md)."""
    if channels >= MIN_WIDE_CHANNELS:
        return 0.3 if batch < MIN_LARGE_BATCH else 0.0
    return 0.5 if batch < MIN_LARGE_BATCH else 0.25


def _choose(
    model: UNet, sampler: Sampler, request: SamplingRequest, shape: tuple[int, ...]
) -> Literal["openvino", "torch"]:
    """Choose OpenVINO where it is installed and saves more time than converting costs; say so in one line."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or not is_installed("openvino"):
        return "torch"
    batch = min(request.batch_size, len(request.seeds))
    parts = 1 if request.config.guidance_scale in (0, 1) or request.guide is not None else 2
    calls = len(sampler) * -(-len(request.seeds) // batch) // (request.config.reuse or 1)
    share = saved_share(model.config.model_channels, parts * batch)
    # a call of one sample tells enough: where all calls of one take less, nothing has to be measured
    seconds = calls * parts * batch * _measure_call(model, shape[1:]) * share if share else 0.0
    entry: Entry = "full" if (request.config.reuse or 1) == 1 else "full_deep"
    cost = CONVERSION_SECONDS
    if seconds and Engines(model, "openvino", "float32").is_kept(entry, shape[1:]):
        cost /= 10  # loading what is kept
    if seconds <= cost:
        return "torch"
    print(f"backend: openvino, which saves some {seconds:.0f} s here", file=sys.stderr)
    return "openvino"


@torch.no_grad()
def _measure_call(model: UNet, sizes: tuple[int, ...]) -> float:
    """Return the seconds of a network's call for one sample, without conditions' embeddings."""
    inputs = draw_step_inputs(
        model, "full", dict(zip(AXES[len(sizes)], sizes, strict=True)) | {"batch": 1, "tokens": 8}
    )
    step = NetworkStep(model, "full").eval()
    seconds = []
    for _ in range(2):  # the first call transforms weights
        start = time.perf_counter()
        step(*inputs.values())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


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
