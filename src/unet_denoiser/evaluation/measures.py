"""Measurements that `doctor` takes of a run: of its data, its training, its network and its samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.evaluation.memorization import Neighbours


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
    bad_weights: list[str]  # names of tensors with NaN or infinity
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
