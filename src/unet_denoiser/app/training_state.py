"""The state of a training, read from its run directory alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unet_denoiser.training.checkpoints import Checkpoints, parse_step
from unet_denoiser.training.run import PROCESS_NAME
from unet_denoiser.training.tracking import read_metrics
from unet_denoiser.utils.files import read_json
from unet_denoiser.utils.processes import Worker, find_worker

LOG_NAME = "train.log"
LOG_BYTES = 8192  # of the end of a log, which is read
Status = Literal["starting", "training", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrainingState:
    """A training: where it is, and what it has measured.

    Args:
        status: "starting" until the first step begins; "stopped" can be resumed; "failed" has no checkpoint.
        step, steps: the last step that is known, and the number of steps in total; None before config.json.
        seconds_left: until the last step, at the mean speed since the training began or was resumed.
        metrics: the lines of metrics.jsonl.
        previews: pictures of samples, the oldest first.
        message: the last line that the training printed, if the page started it.
    """

    status: Status
    step: int
    steps: int | None
    seconds_left: float | None
    metrics: list[dict[str, Any]]
    previews: list[Path]
    message: str

    @property
    def runs(self) -> bool:
        """True while a process trains."""
        return self.status in ("starting", "training")


def read_training(path: Path) -> TrainingState:
    """Read the state of the training in a run directory."""
    worker, metrics = find_worker(path / PROCESS_NAME), read_metrics(path / "metrics.jsonl")
    step = _last_step(path, metrics)
    steps = _planned_steps(path / "config.json")
    previews = sorted((path / "samples").glob("step-*.png"))
    status = _status(worker, step, steps)
    left = None if worker is None else _seconds_left(path / "metrics.jsonl", worker, metrics, steps)
    return TrainingState(status, step, steps, left, metrics, previews, last_line(path / LOG_NAME))


def _status(worker: Worker | None, step: int, steps: int | None) -> Status:
    if worker is not None:
        return "training" if "step" in worker.about else "starting"
    if step == 0:
        return "failed"
    return "finished" if steps is not None and step >= steps else "stopped"


def _last_step(path: Path, metrics: list[dict[str, Any]]) -> int:
    """Return the last step that metrics or checkpoints tell of, 0 before the first."""
    checkpoints = Checkpoints(path / "checkpoints").paths()
    steps = [line["step"] for line in metrics[-1:]] + [parse_step(file) for file in checkpoints[-1:]]
    return max(steps, default=0)


def _planned_steps(config: Path) -> int | None:
    try:
        return int(read_json(config)["training"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seconds_left(file: Path, worker: Worker, metrics: list[dict[str, Any]], steps: int | None) -> float | None:
    """Return the time to the last step by the mean since the worker began, None before its first line of metrics."""
    if steps is None or not metrics or "step" not in worker.about:
        return None
    step = metrics[-1]["step"]
    done, seconds = step - worker.about["step"], file.stat().st_mtime - worker.since
    return seconds / done * (steps - step) if done > 0 and seconds > 0 else None


def last_line(log: Path) -> str:
    """Return the last line of a log, "" if there is none; of a progress bar its last state."""
    lines = read_log(log).splitlines()
    return lines[-1] if lines else ""


def read_log(log: Path) -> str:
    """Return the end of a log, as a terminal would show it: a progress bar overwrites itself."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line)
