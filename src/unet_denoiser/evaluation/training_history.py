"""What a run's checkpoints and log tell of its training, for `doctor`."""

from __future__ import annotations

import json
import math
from pathlib import Path

from unet_denoiser.evaluation.measures import LossCurve, TrainingProgress
from unet_denoiser.training.checkpoints import read_metadata
from unet_denoiser.training.run import Run

MIN_QUARTER_LOSSES = 5  # the mean of fewer logged losses is mostly noise


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
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            loss = json.loads(line)["loss"]
        except (ValueError, KeyError):  # a line cut off by a kill
            continue
        if isinstance(loss, int | float) and math.isfinite(loss):
            losses.append(float(loss))
        else:
            not_finite += 1
    quarter, change = len(losses) // 4, None
    if quarter >= MIN_QUARTER_LOSSES:
        change = sum(losses[-quarter:]) / max(1e-12, sum(losses[-2 * quarter : -quarter])) - 1
    return LossCurve(not_finite, change)
