"""Diagnosis of a run: measures it and names the likely cause of grey, noisy or copied samples (see `findings`)."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.evaluation.findings import Finding, find_problems, likely_cause
from unet_denoiser.evaluation.images import progress_bar, stack_images
from unet_denoiser.evaluation.measures import (
    BATCH_SIZE,
    NUM_LEVELS,
    Batch,
    Measures,
    WeightAverage,
    averaged_over_raw,
    compare_with_guess,
    conditions_of_batch,
    first_items,
    image_statistics,
    loss_curve,
    measure_errors,
    share_of_start,
    training_progress,
)
from unet_denoiser.evaluation.memorization import NUM_PAIRS, compare_without_held_out
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import write_json
from unet_denoiser.utils.images import save_grid

NUM_SAMPLING_STEPS = 25
MAX_IMAGES, MAX_VALUES = 4096, 2**27  # training images whose statistics are taken: 512 MiB of float32 at most


@dataclass(frozen=True)
class Diagnosis:
    """Measurements of a run, their meaning, and the pictures written."""

    measures: Measures
    findings: list[Finding]
    pictures: list[Path]

    def text(self) -> str:
        """Return a few lines to read: the likely cause, the findings, the loss at each noise level."""
        lines = [cause := likely_cause(self.findings), ""]
        for f in [finding for finding in self.findings if finding.text not in cause]:
            lines += [f"{f.severity}: {f.name}: {f.text}", f"    -> {f.advice}"]
        if self.measures.levels:
            lines += ["", "noise level  loss     that of a trivial guess"]
        lines += [f"t = {x.t:<7}  {x.error:<8.4f} {x.trivial:.4f}" for x in self.measures.levels]
        return "\n".join([*lines, "", *map(str, self.pictures)])


def diagnose(
    run: Run,
    data: ImageDataset | StreamDataset | None = None,
    *,
    num_images: int = 128,
    num_samples: int = 32,
    device: str = "cpu",
) -> Diagnosis:
    """Measure a run with its averaged weights and write RUN/doctor: report.json and pictures.

    Args:
        data: the training images (default: loaded anew).
        num_images, num_samples: training images for the loss at each noise level; samples to search for copies.

    Raises:
        ValueError, OSError: a run without a model, or data that cannot be read.
    """
    for name, value in (("num_images", num_images), ("num_samples", num_samples)):
        if value < 2:
            raise ValueError(f"{name}={value} must be at least 2")
    if run.process.distillation is not None:
        reason = run.process.distillation.describe()
        raise ValueError(f"{run.path}: {reason}, so its losses mean nothing; examine the run it was distilled from")
    pipeline = run.load_pipeline(device=device)
    data = load_data(run.data) if data is None else data
    if not isinstance(data, ImageDataset):
        raise ValueError(f"{run.path} was trained on a stream, which cannot be searched; give data that can be indexed")
    count = min(MAX_IMAGES, MAX_VALUES // (data.channels * math.prod(data.image_size)))
    batch = _read_batch(data, max(num_images, num_samples, count))
    measures = _measure_run(run, data, batch)
    measures, denoising = _measure_losses(run, pipeline, first_items(batch, num_images), measures)
    x = _make_samples(pipeline, first_items(batch, num_samples))
    measures, neighbours = _measure_samples(pipeline, x, data, measures, run.path / "doctor" / "neighbours.png")
    findings = find_problems(measures)
    report = {"likely_cause": likely_cause(findings), "findings": [f._asdict() for f in findings]}
    write_json(run.path / "doctor" / "report.json", report | {"measures": measures.to_dict()})
    return Diagnosis(measures, findings, [denoising, *neighbours])


def _read_batch(data: ImageDataset, count: int) -> Batch:
    """Read up to `count` images in a random order, with their conditions; all of one size."""
    size = len(data) if len(data) <= 512 else BATCH_SIZE  # the loader gives full batches only
    stop = max(1, min(count, len(data)) // size)
    batches = list(make_loader(data, size, seed=0, start=0, stop=stop, num_workers=0))
    batches = [batch for batch in batches if batch["image"].shape[1:] == batches[0]["image"].shape[1:]]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _measure_run(run: Run, data: ImageDataset, batch: Batch) -> Measures:
    """Measure all that needs no call of the network."""
    return Measures(
        run=str(run.path),
        data_range=run.process.data_range,
        timesteps=run.process.num_train_timesteps,
        signal_at_end=float(run.process.alphas[-1]),
        data=image_statistics(batch["image"], run.process.data_range),
        training=training_progress(run, len(data)),
        curve=loss_curve(run.path / "metrics.jsonl"),
        levels=[],
        ema=WeightAverage(run.training.ema_decay, share_of_start(run), averaged_over_raw=None),
    )


def _measure_losses(run: Run, pipeline: Pipeline, batch: Batch, measures: Measures) -> tuple[Measures, Path]:
    """Measure the loss at each noise level, and draw an image that is denoised from each."""
    errors, images = measure_errors(pipeline.model, run.process, batch)
    levels = compare_with_guess(errors, run.process, batch["image"])
    ema = replace(measures.ema, averaged_over_raw=averaged_over_raw(run, pipeline.model, errors, batch))
    picture = _save_picture(pipeline, images, run.path / "doctor" / "denoising.png", NUM_LEVELS)
    return replace(measures, levels=levels, ema=ema), picture


def _make_samples(pipeline: Pipeline, batch: Batch) -> Tensor:
    """Make a sample for the conditions of each image."""
    images, steps = batch["image"], min(NUM_SAMPLING_STEPS, pipeline.process.num_train_timesteps)
    with progress_bar(len(images) * steps, "samples", unit_scale=1 / steps) as bar:
        return sample(
            pipeline.model,
            pipeline.process,
            seeds=range(len(images)),
            image_size=images.shape[2:],
            num_inference_steps=steps,
            batch_size=BATCH_SIZE,
            on_step=lambda step: bar.update(len(step.x)),
            **conditions_of_batch(pipeline.model, batch).given(),
        ).cpu()


def _measure_samples(
    pipeline: Pipeline, x: Tensor, data: ImageDataset, measures: Measures, path: Path
) -> tuple[Measures, list[Path]]:
    """Measure samples, compare them with training images of their size, and draw them above the nearest ones."""
    measures = replace(measures, samples=image_statistics(x, pipeline.process.data_range))
    indices = np.arange(len(data))
    if data.buckets is not None:
        indices = next(bucket for bucket in data.buckets if data.item_size(int(bucket[0])) == tuple(x.shape[2:]))
    if not x.isfinite().all() or not measures.data.finite or len(indices) < 2:
        return measures, []
    found, shown = compare_without_held_out(x, data, indices), min(NUM_PAIRS, len(x))
    pairs = torch.cat([x[:shown], stack_images(data, found.indices[:shown].numpy())])
    return replace(measures, neighbours=found.comparison), [_save_picture(pipeline, pairs, path, shown)]


def _save_picture(pipeline: Pipeline, x: Tensor, path: Path, columns: int) -> Path:
    return save_grid(pipeline.decode(x), path, columns, pipeline.image_range)
