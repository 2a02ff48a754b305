"""The command that trains."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import tyro

from unet_denoiser.cli.errors import one_line_ends, one_line_errors
from unet_denoiser.cli.options import (
    DataOptions,
    ModelOptions,
    OptionalName,
    OptionalPath,
    ProcessOptions,
    TrainingOptions,
)


def train(
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None,
    *,
    out: OptionalPath = None,
    resume: OptionalPath = None,
    init: OptionalPath = None,
    preset: OptionalName = None,
    dataset: DataOptions = {},  # noqa: B006  # tyro's way to say: nothing given
    training: TrainingOptions = {},  # noqa: B006
    process: ProcessOptions = {},  # noqa: B006
    model: ModelOptions = {},  # noqa: B006
) -> None:
    """Train a U-Net on your images, or go on with a training.

    Channels, size and classes are taken from the data and the architecture is chosen by size, a smaller one on a CPU;
    options change single fields. The defaults of --model.* below are those of the class, before that choice.

    Args:
        data: "digits" (8x8 handwritten digits); a folder of images whose sub-folders are the classes, or whose
            metadata.csv or metadata.jsonl has captions, labels or numbers; an .npz with `images` (N, H, W[, C]) and
            optionally `labels`, `captions` and `vectors`, or an .npy; Parquet files; or hf:NAME.
        out: the run directory to make (default: runs/ and the data's name).
        resume: a run directory to go on with, instead of DATA; options that do not change what is learned may be
            changed: --steps, --device, --num-workers, how often to save, and so on.
        init: start from this checkpoint's weights and architecture: a run, a model directory, a diffusers folder or a
            file of another library; what does not fit the data is said and trained anew.
        preset: start from a published architecture (see `info`) instead of one chosen by size.
    """
    with one_line_errors():
        if (data is None) == (resume is None):
            raise ValueError("give either DATA or --resume RUN")
        if out is not None and not out.name:
            raise ValueError(f"out={str(out)!r} names no new directory; give one, as in runs/pictures")
        from unet_denoiser.training.launch import resume_run, start_run

        run, trainer = resume_run(resume, locals()) if resume else start_run(str(data), locals())
        total = sum(p.numel() for p in trainer.model.parameters())
        images = f"{len(trainer.data):,} images" if hasattr(trainer.data, "__len__") else "a stream of images"
        say = print if trainer.accelerator.is_main_process else lambda text: None
        say(f"{run.path}: {images}, {total:,} parameters, on {trainer.accelerator.device}")
    with one_line_ends(run.path), _progress(run, trainer) as bar:
        for step in run.train(trainer):
            skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
            text = f"step {step.step}/{run.training.steps}, loss {float(step.loss):.4f}{skipped}"
            bar.set_postfix_str(text, refresh=False)
            bar.update(run.training.batch_size)
    trainer.accelerator.end_training()
    say(f"{run.path}: trained; to sample: unet-denoiser sample {run.path}")


def _progress(run: Any, trainer: Any) -> Any:
    """A bar that counts images, and so shows images per second and the time left."""
    from tqdm import tqdm

    size, main = run.training.batch_size, trainer.accelerator.is_main_process
    done, total = trainer.step * size, run.training.steps * size
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    return tqdm(initial=done, total=total, unit="img", unit_scale=True, mininterval=interval, disable=not main)
