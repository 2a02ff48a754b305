"""The choice of a backend for a sampling: torch, or the network in an engine."""

from __future__ import annotations

from unet_denoiser.export.engines import Engines
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.arguments import SamplingRequest
from unet_denoiser.sampling.samplers import Sampler


def make_engines(model: UNet, sampler: Sampler, request: SamplingRequest, shape: tuple[int, ...]) -> Engines | None:
    """Return the engines that a request asks for; None for torch.

    Args:
        shape: of one sample.
    """
    config = request.config
    if config.backend == "torch":
        return None
    return Engines(model, config.backend, config.backend_precision)  # type: ignore[arg-type]
