"""The records of a training: metrics.jsonl, its plot, and Accelerate's trackers (TensorBoard, W&B)."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.diffusion.loss import Losses
from unet_denoiser.training.trainer import Trainer, TrainingStep
from unet_denoiser.utils.files import sync, write_atomically

LOG_EVERY = 10  # steps
SMOOTHING = 0.999  # of the loss that decides which checkpoint is best: about the last 1000 steps


class MetricsLog:
    """Writes one line of JSON every `LOG_EVERY` steps, with means over the steps since the last line.

    A line has loss, grad_norm and learning_rate; loss_per_level, the unweighted error at each eighth of the noise
    levels (the least noisy first, null where no sample fell); skipped_steps, their total number; and data_wait, the
    fraction of time spent waiting for the next batch. The means leave out skipped steps.

    Its `state` is part of a checkpoint, so that a resumed training writes the same lines.
    """

    def __init__(self, path: Path, num_train_timesteps: int) -> None:
        self.path = path
        self.levels = LossPerNoiseLevel(num_train_timesteps)
        self.sums = {"good": 0.0, "loss": 0.0, "grad_norm": 0.0}
        self.smoothed, self.weight = 0.0, 0.0

    def add(self, step: TrainingStep) -> None:
        """Add a step to the means."""
        if step.skipped:
            return
        self.sums["good"] += 1
        self.sums["loss"] += float(step.loss)
        self.sums["grad_norm"] += float(step.grad_norm)
        self.levels.add(step.losses)
        self.smoothed = SMOOTHING * self.smoothed + (1 - SMOOTHING) * float(step.loss)
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)

    def write(self, step: TrainingStep, skipped_steps: int, data_wait: float) -> dict[str, Any]:
        """Write a line for the steps since the last one, and reset the means."""
        good = self.sums["good"]
        means = {name: self.sums[name] / good if good else None for name in ("loss", "grad_norm")}
        line: dict[str, Any] = {"step": step.step, **means, "learning_rate": step.learning_rate}
        line |= {"skipped_steps": skipped_steps, "loss_per_level": self.levels.means()}
        line["data_wait"] = round(data_wait, 4)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.sums = dict.fromkeys(self.sums, 0.0)
        self.levels.reset()
        return line

    def cut(self, step: int) -> None:
        """Delete the lines after the step that training resumes from, and damaged ones, which it warns of."""
        lines, damaged = _read_lines(self.path)
        if damaged:
            warnings.warn(f"{self.path}: {damaged} damaged lines are dropped", stacklevel=2)
        kept = "".join(f"{text}\n" for text, line in lines if line["step"] <= step)
        write_atomically(self.path, lambda path: path.write_text(kept, encoding="utf-8", newline=""))

    def sync(self) -> None:
        """Flush the lines to the disk; needed before a checkpoint that assumes them is written."""
        if self.path.exists():
            sync(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Return all lines so far, without damaged ones."""
        return read_metrics(self.path)

    def state(self) -> dict[str, Any]:
        """Return the metadata that a checkpoint keeps of the log (JSON)."""
        levels = self.levels.state_dict()["totals"].tolist()
        smoothed = self.smoothed / self.weight if self.weight else None
        metrics = {"sums": self.sums, "levels": levels, "smoothed": self.smoothed, "weight": self.weight}
        return {"metrics": metrics, "smoothed_loss": smoothed}

    def restore(self, metadata: Mapping[str, Any]) -> None:
        """Continue from the metadata of a checkpoint."""
        metrics = metadata.get("metrics")
        if metrics is None:
            return
        self.sums, self.smoothed, self.weight = dict(metrics["sums"]), metrics["smoothed"], metrics["weight"]
        self.levels.load_state_dict({"totals": torch.tensor(metrics["levels"])})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without damaged ones; none if there is no file."""
    return [line for _, line in _read_lines(path)[0]]


def _read_lines(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], int]:
    """Return the lines of metrics.jsonl that name a step, as text and parsed; and the number of damaged lines.

    A last line without its end does not count: a kill cut it off.
    """
    lines, damaged = [], 0
    for text in (path.read_bytes() if path.exists() else b"").split(b"\n")[:-1]:
        try:
            line = json.loads(text)
            valid = isinstance(line, dict) and type(line.get("step")) is int
        except (ValueError, RecursionError):
            valid = False
        if valid:
            lines.append((text.decode(), line))
        else:
            damaged += 1
    return lines, damaged


def read_numbers(lines: Sequence[Mapping[str, Any]], name: str, index: int | None = None) -> list[tuple[int, float]]:
    """Return (step, value) of a metric in the lines that have a finite one; `index` counts in a list of values."""
    found = []
    for line in lines:
        value = line.get(name)
        if index is not None:
            value = value[index] if isinstance(value, list) and index < len(value) else None
        if isinstance(value, int | float) and abs(value) < 1e300:
            found.append((line["step"], float(value)))
    return found


def start_trackers(trainer: Trainer, folder: Path, config: Mapping[str, Any]) -> None:
    """Open the configured tracker, to continue after the trainer's step; ImportError if it is not installed."""
    name = trainer.config.track
    if name is None:
        return
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        raise ImportError(f"track={name!r} needs a package that is not installed: pip install {name}")
    accelerator = trainer.accelerator
    accelerator.log_with = [name]
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.project_configuration.logging_dir = str(folder)
    options = {"tensorboard": {"purge_step": trainer.step + 1}, "wandb": {"dir": str(folder), "name": folder.name}}
    # TensorBoard would write the configuration into another folder, and accepts no nested one
    shown = dict(config) if name == "wandb" else None
    accelerator.init_trackers("unet-denoiser", config=shown, init_kwargs={name: options[name]})


def log_to_trackers(trainer: Trainer, line: Mapping[str, Any]) -> None:
    """Log a line of the metrics to the tracker."""
    levels = {f"loss_per_level/{i}": value for i, value in enumerate(line["loss_per_level"])}
    values = {**line, **levels}
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}
    trainer.accelerator.log(numbers, step=line["step"])


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Plot loss, gradient norm and loss per noise level over the steps, each smoothed, into a PNG."""
    figure = draw_metrics(lines)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def draw_metrics(lines: list[dict[str, Any]]) -> Any:
    """Return matplotlib's figure of loss, gradient norm and loss per noise level over the steps, each smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, norm, levels = figure.subplots(1, 3)
    for axes, name in ((loss, "loss"), (norm, "grad_norm")):
        known = read_numbers(lines, name)
        steps, values = [s for s, _ in known], [v for _, v in known]
        axes.plot(steps, values, color="C0", alpha=0.3, marker="." if len(steps) == 1 else None)
        axes.plot(steps, _smooth(values), color="C0")
    all_levels = [v for line in lines if isinstance(v := line.get("loss_per_level"), list)]
    count = min(64, max(map(len, all_levels), default=0))
    for level in range(count):
        known = read_numbers(lines, "loss_per_level", level)
        shade, smooth = 0.15 + 0.8 * level / max(1, count - 1), _smooth([v for _, v in known])
        levels.plot([s for s, _ in known], smooth, color=(shade * 0.9, 0.2, 1 - shade), label=f"{level + 1}")
    if count:
        levels.legend(title="noise level", fontsize="x-small", ncols=2)
    for axes, title in ((loss, "loss"), (norm, "gradient norm"), (levels, "loss per noise level, 1 the least noisy")):
        axes.set(title=title, xlabel="step", yscale="log")
    return figure


def _smooth(values: list[float]) -> list[float]:
    """Return exponential averages over about a tenth of the line, corrected for the bias of the start."""
    keep, average, weight, smooth = 1 - 1 / (1 + 0.05 * len(values)), 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(average / weight)
    return smooth


class LossPerNoiseLevel:
    """Averages the unweighted error over training steps, separately for equal ranges of timesteps.

    `totals` is (2, num_levels): sums of errors, and numbers of samples. With several processes, sum it
    (`accelerator.reduce(levels.totals)`) before `means`.

    Args:
        num_train_timesteps: T; level i of n begins at timestep i T / n.
        num_levels: number of ranges, the least noisy first.
    """

    def __init__(self, num_train_timesteps: int, num_levels: int = 8) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.totals = torch.zeros(2, num_levels)

    def add(self, losses: Losses) -> None:
        """Add a batch; does not wait for the device."""
        level = losses.t.long() * self.totals.shape[1] // self.num_train_timesteps
        error = losses.error.detach().float()
        self.totals = self.totals.to(error.device)
        self.totals.index_add_(1, level, torch.stack([error, torch.ones_like(error)]))

    def means(self, totals: Tensor | None = None) -> list[float | None]:
        """Return the mean error of each level since the last `reset`, None where no sample fell."""
        sums, counts = (self.totals if totals is None else totals).tolist()
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]

    def reset(self) -> None:
        """Set all sums to zero."""
        self.totals = torch.zeros_like(self.totals)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums since the last `reset`."""
        return {"totals": self.totals.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.totals = state["totals"].clone()
