"""The command `unet-denoiser train`."""

import sys
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
        from unet_denoiser.training.launch import TrainRequest, resume_run, start_run
        from unet_denoiser.training.loop import train as train_run

        source = data if resume is None else moved
        request = TrainRequest(source, out, init, preset, dataset, training, process, model)
        run, trainer, messages = resume_run(resume, request) if resume else start_run(request)
        is_main = trainer.accelerator.is_main_process
        for message in messages if is_main else ():
            print(printable(message))
    with one_line_training_errors(run.path), _progress(run, trainer) as bar:
        for step in train_run(run, trainer):
            skipped = f", {trainer.skipped_steps} steps skipped" if trainer.skipped_steps else ""
            text = (
                f"step {step.step}/{run.training.steps}, loss {float(step.loss):.4f}{skipped}, {step.next_checkpoint}"
            )
            bar.set_postfix_str(text, refresh=False)
            bar.update(run.training.batch_size)
    trainer.accelerator.end_training()
    if is_main:
        print(f"{printable(run.path)}: trained; to sample: {command('sample', run.path)}")


def _progress(run: Any, trainer: Any) -> Any:
    """Create a progress bar that counts images, so that it shows images per second and the time left."""
    from tqdm import tqdm

    size, main = run.training.batch_size, trainer.accelerator.is_main_process
    done, total = trainer.step * size, run.training.steps * size
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    return tqdm(initial=done, total=total, unit="img", unit_scale=True, mininterval=interval, disable=not main)
