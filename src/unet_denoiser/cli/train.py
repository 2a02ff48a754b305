"""The command `unet-denoiser train`."""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

from unet_denoiser.cli import options
from unet_denoiser.cli.errors import one_line_errors, one_line_training_errors
from unet_denoiser.utils.terminal import command, printable


def train(
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None,
    *,
    out: options.OptionalPath = None,
    resume: options.OptionalPath = None,
    moved: Annotated[str | None, tyro.conf.arg(name="data", metavar="DATA", help_behavior_hint="")] = None,
    init: options.OptionalPath = None,
    preset: options.OptionalName = None,
    dataset: options.DataOptions = {},  # noqa: B006  # tyro's way to say: nothing given
    training: options.TrainingOptions = {},  # noqa: B006
    process: options.ProcessOptions = {},  # noqa: B006
    model: options.ModelOptions = {},  # noqa: B006
) -> None:
    """Train a U-Net on your images, or resume a training.

    Channels, size and classes come from the data. The architecture is chosen by the size, a smaller one on a CPU;
    options change single fields. The defaults of --model.* below are those of the class, before that choice.

    Args:
        data: "digits" (8x8 handwritten digits); a folder of images whose sub-folders are the classes, or whose
            metadata.csv or metadata.jsonl has captions, labels or numbers; an .npz with `images` (N, H, W[, C]) and
            optionally `labels`, `captions` and `vectors`, or an .npy; Parquet files; or hf:NAME.
        out: the run directory to create (default: runs/ and the data's name).
        resume: a run directory to resume, instead of DATA; options that do not affect what is learned can change:
            --steps, --device, --num-workers, how often to save, and so on.
        moved: with --resume: where the data are now; --text-encoder, --vae and --concat say so of theirs.
        init: start from this checkpoint's weights and architecture: a run, a model directory, a diffusers folder or a
            file of another library; weights that do not fit the data are listed and trained from a random start.
        preset: start from a published architecture (see `info`) instead of one chosen by size.
    """
    with one_line_errors():
        if moved is not None and resume is None:
            raise ValueError(f"data={moved}: give it without --data, which says with --resume where data are now")
        if (data is None) == (resume is None):
            raise ValueError("give either DATA or --resume RUN; if its data moved, --resume RUN --data NEW")
        if out is not None and not out.name:
            raise ValueError(f"out={str(out)!r} names no new directory; give one, as in runs/images")
        say = choose_say()
        say(f"reading {data or resume} ...")  # the imports alone take seconds
        from unet_denoiser.training.launch import TrainRequest, resume_run, start_run

        request = TrainRequest(data if resume is None else moved, out, init, preset, dataset, training, process, model)
        run, trainer = resume_run(resume, request, say) if resume else start_run(request, say)
    train_to_end(run, trainer, say)


def train_to_end(run: Any, trainer: Any, say: Callable[[str], object]) -> None:
    """Train a run to its last step, with a progress bar; a training that ends early prints why, and exits."""
    from unet_denoiser.training.loop import train as train_run

    with one_line_training_errors(run.path), _progress(run, trainer) as bar:
        for step in train_run(run, trainer):
            skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
            bar.set_postfix_str(f"loss {float(step.loss):.4f}{skipped}, {step.next_checkpoint}", refresh=False)
            bar.update()
            if bar.n - bar.initial == 1:
                bar.refresh()  # the time left is known from here on
    trainer.accelerator.end_training()
    say(f"{run.path}: trained; to sample: {command('sample', run.path)}")


def choose_say() -> Callable[[str], object]:
    """Return a function that prints a line in the main process, and does nothing in the others."""
    return _say if os.environ.get("RANK", "0") == "0" else _say_nothing


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _say_nothing(text: str) -> None:
    pass


def _progress(run: Any, trainer: Any) -> Any:
    """Create a progress bar that counts steps and shows the time left."""
    from tqdm import tqdm

    done, total, main = trainer.step, run.training.steps, trainer.accelerator.is_main_process
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    # smoothing: over some fifty steps, as previews and checkpoints take the time of several
    options: dict[str, Any] = {"unit": "step", "mininterval": interval, "smoothing": 0.02, "disable": not main}
    return tqdm(initial=done, total=total, **options)
