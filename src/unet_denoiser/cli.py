"""The command `unet-denoiser`: parsing and printing."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.cli_evaluate import evaluate
from unet_denoiser.cli_networks import convert, info
from unet_denoiser.endings import one_line_ends, one_line_errors, one_line_warning
from unet_denoiser.options import (
    DataOptions,
    ModelOptions,
    OptionalName,
    OptionalPath,
    OptionalSize,
    ProcessOptions,
    SamplingOptions,
    TrainingOptions,
    chosen,
)
from unet_denoiser.recipe import DeviceName
from unet_denoiser.recipe_sampling import SamplingConfig


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

    Channels, size and classes are taken from the data and the architecture is chosen by size; options change single
    fields. The defaults of --model.* below are those of the class, before that choice.

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
        from unet_denoiser.starting import resumed, started

        run, trainer = resumed(resume, locals()) if resume else started(str(data), locals())
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


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    num_images: int = 16,
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
    captions: Annotated[tuple[str, ...], tyro.conf.arg(name="caption"), tyro.conf.UseAppendAction] = (),
    vector: tuple[float, ...] = (),
    concat_image: OptionalPath = None,
    mask: OptionalPath = None,
    sampling: SamplingOptions = {},  # noqa: B006
    seed: int = 0,
    batch_size: int = 64,
    image_size: OptionalSize = None,
    out: OptionalPath = None,
    separate: bool = False,
    device: DeviceName = "auto",
    checkpoint: str = "latest",
) -> None:
    """Generate images with a trained run.

    Args:
        run: a run directory.
        num_images: how many; image i has the seed SEED + i and depends on nothing else.
        classes: names of the classes to generate, in turn (default: all of the run's).
        captions: a text to draw; give the option again for more, which then take turns.
        vector: the numbers that condition the samples, for a run trained with --vector-columns or `vectors`.
        concat_image: the picture to enlarge, to paint into or to translate, for a run trained with --concat.
        mask: white where to paint, for a run trained with --concat inpainting.
        seed: seed of the first image.
        batch_size: images at a time; does not change them.
        image_size: one number or height and width (default: as trained).
        out: the picture (default: RUN/samples.png); one row per class or caption.
        separate: also write every image to a file of its own, into a folder beside the picture.
        device: "auto" takes a GPU where there is one.
        checkpoint: "latest", a step's number, or "best": the lowest smoothed training loss of those that are kept.
    """
    from tqdm import tqdm

    with one_line_errors():
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        if not -(2**63) <= seed < 2**63 - num_images:
            raise ValueError(f"seed={seed} must fit 64 bits")
        if out is not None and out.is_dir():
            raise ValueError(f"out={out} is a folder; give the picture's name")
        if out is not None and out.suffix not in (".png", ".npy"):
            raise ValueError(f"out={out}: pictures are PNG, other samples .npy; give a name that ends so")
        config = SamplingConfig(**sampling)
        from unet_denoiser.distribution import resolve_device
        from unet_denoiser.run import Run
        from unet_denoiser.samplers import Sampler
        from unet_denoiser.sampling import sample as generate

        loaded = Run.load(run)
        model = loaded.load_model(checkpoint).to(resolve_device(device))
        conditions = _conditions(loaded, num_images, classes, captions, vector, concat_image, mask)
        if not conditions and config.guidance_scale != 1:
            raise ValueError(
                f"guidance_scale={config.guidance_scale} needs a class, caption, vector or picture to follow; give one"
                ", or 1"
            )
        size = image_size[0] if image_size is not None and len(image_size) == 1 else image_size
        calls = len(Sampler(config, loaded.process))
        with tqdm(total=num_images * calls, unit="step", disable=None) as bar:
            x = generate(
                model,
                loaded.process,
                seeds=range(seed, seed + num_images),
                image_size=size,
                batch_size=batch_size,
                config=config,
                on_step=lambda step: bar.update(len(step.x)),
                **conditions,
            ).cpu()
        x = loaded.decode(x)
        picture = loaded.save_grid(x, out or run / "samples.png", classes or captions)
        print(picture)
        if separate:
            folder = picture.with_name(f"{picture.stem}-separate")
            _save_each(loaded, x, seed, conditions.get("class_labels"), folder)
            print(folder)


def _conditions(
    run: Any,
    count: int,
    classes: Sequence[str],
    captions: Sequence[str],
    vector: Sequence[float],
    concat_image: Path | None,
    mask: Path | None,
) -> dict[str, Any]:
    """What the samples shall follow, one row each; classes and captions take turns."""
    import torch

    conditions: dict[str, Any] = {}
    if classes or (run.class_names and not captions):
        conditions["class_labels"] = run.labels(count, classes)
    if captions:
        conditions |= run.encode_captions([captions[i % len(captions)] for i in range(count)])
    if vector:
        conditions["vector"] = torch.tensor(vector).expand(count, -1)
    if concat_image is not None or mask is not None:
        concat = run.read_concat(concat_image, mask)
        conditions["concat"] = concat.expand(count, *concat.shape[1:])
    return conditions


def _save_each(run: Any, x: Any, seed: int, labels: Any, folder: Path) -> None:
    """Every sample in a file named by its seed, and its class where it has one."""
    from unet_denoiser.images import save_image, to_uint8

    for i, image in enumerate(x):
        name = "" if labels is None else "-" + run.class_names[int(labels[i])].replace("/", "_")
        pixels = to_uint8(image, run.picture_range) if run.picture_range else image
        save_image(pixels, folder / f"{seed + i:06d}{name}.png")


def doctor(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    data: OptionalPath = None,
    num_images: int = 128,
    num_samples: int = 32,
    device: DeviceName = "auto",
) -> None:
    """Look at a run: why are its samples grey, noisy or copies? Writes RUN/doctor.

    Args:
        run: a run directory.
        data: the data it was trained on, where they are now (default: as trained).
        num_images: images that the loss per noise level is measured on.
        num_samples: samples to make and to look for among the training images.
        device: "auto" takes a GPU where there is one.
    """
    from tqdm import tqdm

    with one_line_errors():
        from unet_denoiser.data import load_data
        from unet_denoiser.distribution import resolve_device
        from unet_denoiser.doctor import SAMPLING_STEPS, examine
        from unet_denoiser.run import Run

        loaded = Run.load(run)
        images = None if data is None else load_data(loaded.with_data(source=str(data)).data)
        with tqdm(total=num_samples * SAMPLING_STEPS, unit="step", disable=None) as bar:
            report = examine(
                loaded,
                images,
                num_images=num_images,
                num_samples=num_samples,
                device=resolve_device(device),
                on_step=lambda step: bar.update(len(step.x)),
            )
    print(report.text())


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "sample": sample,
    "evaluate": evaluate,
    "doctor": doctor,
    "info": info,
    "convert": convert,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads on a CPU wait for each other in a busy loop. On cores that something else uses too, a small
        # network's training step then took 5.5 s instead of 0.6 s with this limit; on free cores it is the same
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    before, warnings.formatwarning = warnings.formatwarning, one_line_warning
    what = "Train a diffusion model on your images, sample from it, look at networks and convert them."
    try:
        chosen(COMMANDS, what, args)()
    finally:
        warnings.formatwarning = before
