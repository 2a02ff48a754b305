"""Trainings as processes of their own, which outlive the page: start, stop, resume."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unet_denoiser.app.training_state import LOG_NAME, read_training
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.training.loop import check_new
from unet_denoiser.training.run import PROCESS_NAME, Run
from unet_denoiser.utils.files import check_writable
from unet_denoiser.utils.processes import announce, find_worker


def start_training(source: str, out: Path, options: Mapping[str, Any]) -> None:
    """Start `train SOURCE --out OUT`; ValueError or OSError if an option cannot work.

    What only the data can tell, such as a file that is no image, is in OUT/train.log when the process has ended.

    Args:
        options: of `TrainingConfig` and `DataConfig`; those that are None are left out.
    """
    given = {name: value for name, value in options.items() if value is not None}
    size = given.get("image_size")
    if size is not None and size < 1:
        raise ValueError(f"image_size={size} must be positive")
    TrainingConfig(**{name: value for name, value in given.items() if name != "image_size"})
    check_new(out)
    check_writable(out)
    place = source if source == "digits" else str(Path(source).absolute())
    _run(out, ["train", place, "--out", str(out.absolute()), *_as_arguments(given)])


def resume_training(path: Path, steps: int | None = None) -> None:
    """Resume a run, by default to the number of steps that it has; ValueError if it trains, or has no checkpoint."""
    if find_worker(path / PROCESS_NAME) is not None:
        raise ValueError(f"{path} is training already; stop it first, or wait until it ends")
    run = Run.load(path)
    if not run.checkpoints.paths():
        raise ValueError(f"{path} has no checkpoint to resume from; start a new training")
    if steps is not None:
        run.with_training(steps=steps)
        if steps <= (step := read_training(path).step):
            raise ValueError(f"steps={steps}: {path} is already at step {step}; give a larger number")
    _run(path, ["train", "--resume", str(path.absolute()), *_as_arguments({"steps": steps} if steps else {})])


def stop_training(path: Path) -> None:
    """Ask a training to stop: it finishes its step and writes a checkpoint; ValueError if none runs."""
    worker = find_worker(path / PROCESS_NAME)
    if worker is None:
        raise ValueError(f"{path}: no training runs here; there is nothing to stop")
    os.kill(worker.pid, signal.SIGTERM)  # SIGINT is ignored by what a shell started in the background


def _as_arguments(options: Mapping[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def _run(path: Path, arguments: Sequence[str]) -> None:
    """Start a command in a session of its own, with its output in PATH/train.log."""
    path.mkdir(parents=True, exist_ok=True)
    (path / PROCESS_NAME).unlink(missing_ok=True)  # that of a killed training
    with (path / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "unet_denoiser", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals to the page, such as Ctrl+C, do not reach it
        )
    if not (path / PROCESS_NAME).exists():  # until the training says so itself: imports and data take seconds
        announce(path / PROCESS_NAME, process.pid)
    threading.Thread(target=process.wait, daemon=True).start()  # else the ended process would stay in the table
