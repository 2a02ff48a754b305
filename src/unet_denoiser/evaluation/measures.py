"""Measurements that `doctor` takes of a run: of its data, its training, its network and its samples."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.diffusion.loss import training_losses
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.evaluation.images import progress_bar
from unet_denoiser.evaluation.memorization import Neighbours
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.unet import UNet
from unet_denoiser.training.checkpoints import read_checkpoint, read_metadata
from unet_denoiser.training.run import Run

BATCH_SIZE = 32
NUM_LEVELS = 8  # noise levels, evenly spaced
MIN_QUARTER_LOSSES = 5  # the mean of fewer logged losses is mostly noise
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of images or samples (N, C, *spatial)."""

    finite: bool  # False if a value is NaN or infinite; the other statistics count NaN as 0
    shape: list[int]
    min: float
    max: float
    mean: list[float]  # of each channel
    mean_error: float  # standard error of the means, the largest of all channels
    std: float  # over images and pixels, root mean square of all channels
    roughness: float  # mean squared difference of neighbouring pixels over twice the variance: 1 for independent pixels
    saturated: float  # share of values within 0.5 % of an end of the data range; 0 for unbounded data


@dataclass(frozen=True)
class NoiseLevelError:
    """Mean squared error of the network's output at timestep t, beside that of a guess (see `compare_with_guess`)."""

    t: int
    signal: float  # variance of alpha x0 over the variance of the noise
    error: float
    trivial: float  # of the guess
    ratio: float  # error / trivial


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training, by its latest checkpoint."""

    step: int | None  # None without a checkpoint
    steps: int  # planned
    images: int
    epochs: float | None


@dataclass(frozen=True)
class LossCurve:
    """The logged losses."""

    not_finite: int  # how many
    change: float | None  # of the mean from the third to the last quarter, relative; None for few losses


@dataclass(frozen=True)
class WeightAverage:
    """The exponential moving average of the weights."""

    decay: float
    share_of_start: float | None  # weight of the initial parameters; None without a checkpoint
    averaged_over_raw: float | None  # loss of the averaged weights over that of the latest raw ones


@dataclass(frozen=True)
class Measures:
    """All measurements of a run; `levels` and what follows need weights without NaN."""

    run: str  # its path
    data_range: tuple[float, float] | None  # that the process expects; None for unbounded data
    timesteps: int  # T of the process
    signal_at_end: float  # alpha of the last timestep
    data: ImageStatistics
    training: TrainingProgress
    curve: LossCurve
    ema: WeightAverage
    levels: list[NoiseLevelError]
    samples: ImageStatistics | None = None
    neighbours: Neighbours | None = None  # of samples; the reference are training images

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as report.json holds them; what could not be measured is {}."""
        neighbours: dict[str, Any] = {}
        if (n := self.neighbours) is not None:
            neighbours = {"samples": n.median, "data": n.held_out_median, "searched": n.searched, "closer": n.closer}
            neighbours |= {"copies": n.copies_are_likely} | ({} if n.ratio is None else {"ratio": n.ratio})
        return asdict(self) | {"samples": asdict(self.samples) if self.samples else {}, "neighbours": neighbours}


def image_statistics(x: Tensor, data_range: tuple[float, float] | None) -> ImageStatistics:
    """Measure images or samples (N, C, *spatial)."""
    finite = bool(torch.isfinite(x).all())
    x = x.float().nan_to_num()  # JSON has neither NaN nor infinity
    variance = x.var(dim=[0, *range(2, x.ndim)], correction=0).mean()
    roughness = x.diff(dim=-1).square().mean() / 2 / variance.clamp_min(1e-12) if x.shape[-1] > 1 else torch.tensor(1.0)
    saturated = torch.tensor(0.0)
    if data_range is not None:
        low, high = data_range
        margin = 0.005 * (high - low)
        saturated = ((x <= low + margin) | (x >= high - margin)).float().mean()
    image_means = x.flatten(2).mean(2)
    return ImageStatistics(
        finite=finite,
        shape=list(x.shape),
        min=float(x.min()),
        max=float(x.max()),
        mean=x.mean(dim=[0, *range(2, x.ndim)]).tolist(),
        mean_error=float(image_means.std(0, correction=min(1, len(x) - 1)).max()) / math.sqrt(len(x)),
        std=float(variance.sqrt()),
        roughness=float(roughness),
        saturated=float(saturated),
    )


def training_progress(run: Run, num_images: int) -> TrainingProgress:
    """Read how far the training is."""
    paths = run.checkpoints.paths()
    step = int(read_metadata(paths[-1])["step"]) if paths else None
    epochs = (step or 0) * run.training.batch_size / num_images if num_images else None
    return TrainingProgress(step, run.training.steps, num_images, epochs)


def share_of_start(run: Run) -> float | None:
    """Return the weight of the initial parameters in the averaged ones; None without a checkpoint.

    It is the product of all decays so far, min(decay, (1 + n) / (10 + n)) in update n (see `EMA`).
    """
    if not (paths := run.checkpoints.paths()):
        return None
    updates, decay = int(read_metadata(paths[-1])["ema_updates"]), run.training.ema_decay
    return math.exp(sum(math.log(max(1e-300, min(decay, (1 + n) / (10 + n)))) for n in range(1, updates + 1)))


def loss_curve(path: Path) -> LossCurve:
    """Read the losses of metrics.jsonl; a missing file has none."""
    losses, not_finite = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            loss = json.loads(line)["loss"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a line cut off by a kill, or damaged
            continue
        if isinstance(loss, int | float) and abs(loss) < 1e300:
            losses.append(float(loss))
        elif loss is None or isinstance(loss, float):
            not_finite += 1
    quarter, change = len(losses) // 4, None
    if quarter >= MIN_QUARTER_LOSSES:
        change = sum(losses[-quarter:]) / max(1e-12, sum(losses[-2 * quarter : -quarter])) - 1
    return LossCurve(not_finite, change)


def timesteps(process: Diffusion) -> list[int]:
    """Return NUM_LEVELS evenly spaced timesteps."""
    return [process.num_train_timesteps * (2 * i + 1) // (2 * NUM_LEVELS) for i in range(NUM_LEVELS)]


def first_items(batch: Batch, count: int) -> Batch:
    """Return the first items of a batch."""
    return {name: value[:count] for name, value in batch.items()}


def conditions_of_batch(model: UNet, batch: Batch) -> Conditions:
    """Take the conditions that the network is built for."""
    return Conditions.select(batch, [*model.config.conditions, "concat"])


def measure_errors(model: UNet, process: Diffusion, batch: Batch) -> tuple[Tensor, Tensor]:
    """Measure the network's squared errors on images (N, C, *spatial) with their conditions, at every noise level.

    Returns:
        Errors (NUM_LEVELS, N); and (3 NUM_LEVELS, C, *spatial): x_t of one image at each level, its predicted x0, x0.
    """
    device, errors, shown = model.device, [], []
    outputs: list[Tensor] = []

    def network(*args: Any, **inputs: Any) -> Tensor:
        outputs[:] = [model(*args, **inputs)]
        return outputs[0]

    bar = progress_bar(NUM_LEVELS * len(batch["image"]), "error at each noise level")
    for t in timesteps(process):
        level = []
        for start in range(0, len(batch["image"]), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            x0 = batch["image"][part].to(device)
            conditions: dict[str, Any] = conditions_of_batch(model, batch).rows(part).to(device).given()
            # drawn on the CPU, by position, so that it is the same for every network and device
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(start + t)).to(device)
            t_batch = torch.full((len(x0),), t, device=device)
            with torch.no_grad():
                losses = training_losses(process, network, x0, t=t_batch, noise=noise, **conditions)
            level.append(losses.error.cpu())
            bar.update(len(x0))
            if start == 0:
                xt = process.add_noise(x0[:1], noise[:1], t_batch[:1])
                output = outputs[0][:1, : x0.shape[1]].float()
                predicted = process.predict_x0(output, xt, process.alphas[t].to(device), process.sigmas[t].to(device))
                shown.append(torch.cat([xt, predicted, x0[:1]]).cpu())
        errors.append(torch.cat(level))
    bar.close()
    return torch.stack(errors), torch.stack(shown, dim=1).flatten(0, 1)


def compare_with_guess(errors: Tensor, process: Diffusion, x0: Tensor) -> list[NoiseLevelError]:
    """Return the mean error at every noise level beside the error of a trivial guess.

    The guess knows mean and variance v of each channel, and takes each pixel of x0 from the same pixel of x_t. For
    independent Gaussian pixels it is the best there is; its squared error in x0 is v sigma^2 / (alpha^2 v + sigma^2).

    Args:
        errors: of the images x0 (N, C, *spatial), see `measure_errors`.
    """
    v = x0.float().var(dim=[0, *range(2, x0.ndim)], correction=0).double()
    levels = []
    for t, error in zip(timesteps(process), errors.mean(1).tolist(), strict=True):
        alpha, sigma = process.alphas[t].double(), process.sigmas[t].double()
        snr = (alpha / sigma).square()
        x0_error = (v * sigma**2 / (alpha**2 * v + sigma**2)).mean()
        trivial = float(x0_error * process.prediction.error_scale(snr))
        levels.append(NoiseLevelError(t, float(snr * v.mean()), error, trivial, ratio=error / max(trivial, 1e-12)))
    return levels


def averaged_over_raw(run: Run, model: UNet, errors: Tensor, batch: Batch) -> float | None:
    """Return the loss of the averaged weights over the loss of the latest raw ones, on the same images and noise.

    It is the geometric mean over the noise levels, so that each counts the same. None without a checkpoint, and for
    LoRA, whose checkpoints hold no other weights.

    Args:
        errors: of `model`, which has the averaged weights, on the batch; see `measure_errors`.
    """
    paths = run.checkpoints.paths()
    if not paths or run.training.lora_rank:
        return None
    tensors, _ = read_checkpoint(paths[-1])
    raw = {name.removeprefix("model."): tensors[name] for name in tensors if name.startswith("model.")}
    raw_model = UNet.from_config(model.config).eval()
    raw_model.load_state_dict(model.state_dict() | raw)
    raw_model = raw_model.to(model.device)
    raw_errors, _ = measure_errors(raw_model, run.process, first_items(batch, BATCH_SIZE))
    log_averaged, log_raw = (e[:, :BATCH_SIZE].mean(1).clamp_min(1e-12).log() for e in (errors, raw_errors))
    ratio = float((log_averaged - log_raw).mean().exp())
    return ratio if math.isfinite(ratio) else None
