"""The network's error at each noise level, for `doctor`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unet_denoiser.diffusion.loss import training_losses
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.evaluation.measures import NoiseLevelError
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.training.checkpoints import read_checkpoint
from unet_denoiser.training.run import Run

BATCH_SIZE = 32
NUM_LEVELS = 8
Batch = Mapping[str, Tensor]


class PredictionErrors(NamedTuple):
    """Squared errors of the network's output, and one image at all noise levels."""

    errors: Tensor  # (NUM_LEVELS, N)
    images: Tensor  # (3 NUM_LEVELS, C, *spatial): x_t at each level, then the predicted x0, then x0


def timesteps(process: Diffusion) -> list[int]:
    """Return NUM_LEVELS evenly spaced timesteps."""
    return [process.num_train_timesteps * (2 * i + 1) // (2 * NUM_LEVELS) for i in range(NUM_LEVELS)]


def first_items(batch: Batch, count: int) -> Batch:
    """Return the first items of a batch."""
    return {name: value[:count] for name, value in batch.items()}


def conditions_of_batch(model: UNet, batch: Batch) -> Conditions:
    """Take the conditions that the network is built for."""
    return Conditions.select(batch, [*model.config.conditions, "concat"])


def measure_errors(model: UNet, process: Diffusion, batch: Batch) -> PredictionErrors:
    """Measure the network's squared errors on images (N, C, *spatial) with their conditions, at every noise level."""
    device, errors, shown = model.input_conv.weight.device, [], []
    for t in timesteps(process):
        level = []
        for start in range(0, len(batch["image"]), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            x0 = batch["image"][part].to(device)
            conditions: dict[str, Any] = conditions_of_batch(model, batch).rows(part).to(device).given()
            # drawn on the CPU, by position, so that it is the same for every network and device
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(start + t)).to(device)
            t_batch = torch.full((len(x0),), t, device=device)
            recorder = _OutputRecorder(model)
            with torch.no_grad():
                losses = training_losses(process, recorder, x0, t=t_batch, noise=noise, **conditions)
            level.append(losses.error.cpu())
            if start == 0:
                xt = process.add_noise(x0[:1], noise[:1], t_batch[:1])
                output = recorder.output[:1, : x0.shape[1]].float()
                predicted = process.predict_x0(output, xt, process.alphas[t].to(device), process.sigmas[t].to(device))
                shown.append(torch.cat([xt, predicted, x0[:1]]).cpu())
        errors.append(torch.cat(level))
    return PredictionErrors(torch.stack(errors), torch.stack(shown, dim=1).flatten(0, 1))


class _OutputRecorder:
    """A network that keeps its last output."""

    def __init__(self, model: UNet) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.output: Tensor = self.model(*args, **kwargs)
        return self.output


def compare_with_guess(errors: Tensor, process: Diffusion, x0: Tensor) -> list[NoiseLevelError]:
    """Return the mean error at every noise level beside the error of a trivial guess.

    The guess knows mean and variance v of each channel, and takes each pixel of x0 from the same pixel of x_t. For
    independent Gaussian pixels it is the best there is; its squared error in x0 is v sigma^2 / (alpha^2 v + sigma^2).

    Args:
        errors: (NUM_LEVELS, N), see `measure_errors`.
        x0: (N, C, *spatial) images.
    """
    v = x0.float().var(dim=[0, *range(2, x0.ndim)], correction=0).double()
    levels = []
    for t, error in zip(timesteps(process), errors.mean(1).tolist(), strict=True):
        alpha, sigma = process.alphas[t].double(), process.sigmas[t].double()
        snr = (alpha / sigma).square()
        x0_error = (v * sigma**2 / (alpha**2 * v + sigma**2)).mean()
        trivial = float(x0_error * PREDICTIONS[process.prediction_type].error_scale(snr))
        levels.append(NoiseLevelError(t, float(snr * v.mean()), error, trivial, ratio=error / max(trivial, 1e-12)))
    return levels


def averaged_over_raw(run: Run, model: UNet, errors: Tensor, batch: Batch) -> float | None:
    """Return the loss of the averaged weights over the loss of the latest raw ones, on the same images and noise.

    It is the geometric mean over the noise levels, so that each counts the same. None without a checkpoint, and for
    LoRA, whose checkpoints hold no other weights.

    Args:
        model: with the averaged weights.
        errors: of `model` on the batch, see `measure_errors`.
    """
    paths = run.checkpoints.paths()
    if not paths or run.training.lora_rank:
        return None
    tensors, _ = read_checkpoint(paths[-1])
    raw = {name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")}
    raw_model = UNet.from_config(model.config).eval()
    raw_model.load_state_dict(model.state_dict() | raw)
    raw_model = raw_model.to(model.input_conv.weight.device)
    raw_errors, _ = measure_errors(raw_model, run.process, first_items(batch, BATCH_SIZE))
    log_averaged, log_raw = (e[:, :BATCH_SIZE].mean(1).clamp_min(1e-12).log() for e in (errors, raw_errors))
    ratio = float((log_averaged - log_raw).mean().exp())
    return ratio if math.isfinite(ratio) else None
