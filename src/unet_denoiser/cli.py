"""The command `unet-denoiser`: parsing and printing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro

from unet_denoiser.config import UNetConfig
from unet_denoiser.options import (
    ModelOptions,
    OptionalName,
    OptionalNumber,
    OptionalOrder,
    OptionalPath,
    OptionalSize,
    ProcessOptions,
    TrainingOptions,
    chosen,
    show,
)
from unet_denoiser.recipe import CheckpointFormat, DeviceName, SamplerName, TrainingConfig


def train(
    data: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="DATA", help_behavior_hint="")] = None,
    *,
    out: OptionalPath = None,
    resume: OptionalPath = None,
    image_size: OptionalSize = None,
    preset: OptionalName = None,
    training: TrainingOptions = {},  # noqa: B006  # tyro's way to say: nothing given
    process: ProcessOptions = {},  # noqa: B006
    model: ModelOptions = {},  # noqa: B006
) -> None:
    """Train a U-Net on your images, or go on with a training.

    Channels, size and classes are taken from the data and the architecture is chosen by size; options change single
    fields. The defaults of --model.* below are those of the class, before that choice.

    Args:
        data: "digits" (8x8 handwritten digits), a folder of images whose sub-folders are the classes, or an .npz with
            `images` (N, H, W[, C]) uint8 or float in [-1, 1] and optionally `labels`.
        out: the run directory to make (default: runs/ and the data's name).
        resume: a run directory to go on with, instead of DATA; --steps, --checkpoint-every, --preview-every,
            --num-workers and --device may be changed.
        image_size: resize to this, one number or height and width (default: that of most images up to 64, else 64).
        preset: start from a published architecture (see `info`) instead of one chosen by size.
    """
    with one_line_errors():
        if (data is None) == (resume is None):
            raise ValueError("give either DATA or --resume RUN")
        run, trainer = _resumed(resume, locals()) if resume else _started(str(data), locals())
        total = sum(p.numel() for p in trainer.model.parameters())
        print(f"{run.path}: {len(trainer.data):,} images, {total:,} parameters, on {trainer.accelerator.device}")
    with one_line_errors((OSError,)), _progress(run, trainer) as bar:
        for step in run.train(trainer):
            bar.set_postfix_str(f"step {step.step}/{run.training.steps}, loss {float(step.loss):.4f}", refresh=False)
            bar.update(run.training.batch_size)
    if trainer.accelerator.is_main_process:
        print(f"{run.path}: trained; to sample: unet-denoiser sample {run.path}")


def _progress(run: Any, trainer: Any) -> Any:
    """A bar that counts images, and so shows images per second and the time left."""
    from tqdm import tqdm

    size, main = run.training.batch_size, trainer.accelerator.is_main_process
    done, total = trainer.step * size, run.training.steps * size
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file needs no animation
    return tqdm(initial=done, total=total, unit="img", unit_scale=True, mininterval=interval, disable=not main)


def _started(source: str, given: dict[str, Any]) -> tuple[Any, Any]:
    from unet_denoiser.data import load_data
    from unet_denoiser.diffusion import Diffusion
    from unet_denoiser.presets import architecture_for
    from unet_denoiser.presets import preset as preset_config
    from unet_denoiser.run import Run

    preset, options = given["preset"], dict(given["model"])
    training, process = TrainingConfig(**given["training"]), Diffusion(**given["process"])
    if given["image_size"] == ():
        raise ValueError("image_size is empty; give one number, or height and width")
    size = given["image_size"] or (preset and preset_config(preset).image_size) or None
    size = size[0] if isinstance(size, tuple) and len(size) == 1 else size
    data = load_data(source, size, options.get("in_channels"))
    classes = None if data.class_names is None else len(data.class_names)
    config = architecture_for(data.channels, data.image_size, classes, options, preset)
    chosen: dict[str, Any] = {"source": source if source == "digits" else str(Path(source).absolute())}
    chosen |= {"image_size": list(data.image_size), "channels": data.channels, "class_names": data.class_names}
    place = Path(source).absolute()
    out = given["out"] or Path("runs") / (place.name if place.is_dir() else place.stem)
    run = Run(out, chosen, config, process, training)
    run.check_new()
    trainer = run.trainer(data)
    run.write()
    return run, trainer


def _resumed(path: Path, given: dict[str, Any]) -> tuple[Any, Any]:
    from unet_denoiser.run import Run

    changeable = {"steps", "checkpoint_every", "preview_every", "num_workers", "device"}
    fixed = [name for name in ("out", "image_size", "preset", "process", "model") if given[name]]
    fixed += sorted(set(given["training"]) - changeable)
    if fixed:
        valid = ", ".join(sorted(changeable))
        raise ValueError(f"{fixed[0]} cannot change with --resume; what can: {valid}")
    run = Run.load(path).with_training(**given["training"])
    trainer = run.trainer()
    if trainer.step > run.training.steps:
        raise ValueError(f"steps={run.training.steps}: {path} is already at step {trainer.step}")
    run.write()
    return run, trainer


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    num_images: int = 16,
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
    guidance_scale: float = 1.0,
    num_inference_steps: int = 25,
    sampler: SamplerName = "dpm++",
    clip_sample: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    image_size: OptionalSize = None,
    out: OptionalPath = None,
    separate: bool = False,
    device: DeviceName = "auto",
) -> None:
    """Generate images with a trained run.

    Args:
        run: a run directory.
        num_images: how many; image i has the seed SEED + i and depends on nothing else.
        classes: names of the classes to generate, in turn (default: all of the run's).
        guidance_scale: how strongly to follow the class; 1 is off, 2 to 5 are usual.
        num_inference_steps: steps of the reverse process: more is slower and more exact.
        sampler: the sampler; ddpm wants hundreds of steps, the others tens.
        clip_sample: clip each predicted clean image to the data's range.
        seed: seed of the first image.
        batch_size: images at a time; does not change them.
        image_size: one number or height and width (default: as trained).
        out: the picture (default: RUN/samples.png); one row per class.
        separate: also write every image to a file of its own, into a folder beside the picture.
        device: "auto" takes a GPU where there is one.
    """
    from tqdm import tqdm

    with one_line_errors():
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        if not -(2**63) <= seed < 2**63 - num_images:
            raise ValueError(f"seed={seed} must fit 64 bits")
        if out is not None and out.is_dir():
            raise ValueError(f"out={out} is a folder; give the picture's name")
        from unet_denoiser.images import save_image, to_uint8
        from unet_denoiser.run import Run
        from unet_denoiser.sampling import sample as generate
        from unet_denoiser.training import resolve_device

        loaded = Run.load(run)
        model = loaded.load_model().to(resolve_device(device))
        all_names = loaded.class_names or []
        labels = loaded.labels(num_images, classes) if classes or all_names else None
        if labels is None and guidance_scale != 1:
            raise ValueError(f"guidance_scale={guidance_scale} needs classes, and {run} was trained without; give 1")
        size = image_size[0] if image_size is not None and len(image_size) == 1 else image_size
        with tqdm(total=num_images * num_inference_steps, unit="step", disable=None) as bar:
            x = generate(
                model,
                loaded.process,
                seeds=range(seed, seed + num_images),
                image_size=size,
                batch_size=batch_size,
                sampler=sampler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                clip_sample=clip_sample,
                on_step=lambda step: bar.update(len(step.x)),
                class_labels=labels,
            ).cpu()
        picture = loaded.save_grid(x, out or run / "samples.png", classes)
        print(picture)
        if separate:
            folder = picture.with_name(f"{picture.stem}-separate")
            names = (
                [""] * num_images if labels is None else ["-" + all_names[i].replace("/", "_") for i in labels.tolist()]
            )
            for i, (image, name) in enumerate(zip(x, names, strict=True), start=seed):
                pixels = to_uint8(image, loaded.process.data_range) if loaded.process.data_range else image
                save_image(pixels, folder / f"{i:06d}{name}.png")
            print(folder)


def info(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_RUN")], *, diagram: OptionalPath = None
) -> None:
    """Show a network: its levels with sizes, widths, heads, parameters and FLOPs.

    Args:
        name: a preset's name, a run directory, or a directory with a saved model.
        diagram: also draw the network into this .svg file.
    """
    with one_line_errors():
        from unet_denoiser.files import read_json
        from unet_denoiser.presets import PRESETS, preset
        from unet_denoiser.run import Run

        if name in PRESETS:
            config = preset(name)
        elif (Path(name) / "model").is_dir() or (Path(name) / "metrics.jsonl").exists():
            config = Run.load(name).model
        elif (Path(name) / "config.json").is_file():
            config = UNetConfig.from_dict(read_json(Path(name) / "config.json"))
        else:
            raise ValueError(f"{name!r} is neither a run or model directory nor a preset: {', '.join(PRESETS)}")
        if diagram is not None:
            if diagram.suffix != ".svg":
                raise ValueError(f"diagram={diagram}: give a name that ends in .svg")
            from unet_denoiser.diagram import diagram as draw
            from unet_denoiser.files import write_atomically

            write_atomically(diagram, lambda path: path.write_text(draw(config), encoding="utf-8"))
    from unet_denoiser.summary import summarize, table

    print(table(summarize(config)))
    print("\n" + ", ".join(f"{k}={show(v)}" for k, v in asdict(config).items()))


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    to: CheckpointFormat = "unet-denoiser",
    ema: bool = False,
    num_heads: OptionalNumber = None,
    head_dim: OptionalNumber = None,
    qkv_order: OptionalOrder = None,
    variant: OptionalName = None,
    lora: OptionalPath = None,
    lora_scale: float = 1.0,
    verify: bool = False,
) -> None:
    """Convert a checkpoint of DDPM, ADM, EDM, LDM, Stable Diffusion or diffusers to this library's format, or back.

    Args:
        source: a run, a model directory, a diffusers folder, or a .safetensors, .ckpt or .pt file; its layout and
            architecture are recognised.
        target: what to write: a folder for "unet-denoiser", "diffusers" and "pipeline", else a .safetensors file.
        to: the format to write; "pipeline" is a run's network and schedule together, for diffusers' DiffusionPipeline.
        ema: take the averaged weights of a file that has both.
        num_heads: attention heads, where the file does not tell and the network is none of the known ones.
        head_dim: channels per head instead.
        qkv_order: how an ADM file packs its attention, likewise ("new" is use_new_attention_order).
        variant: the weights to take of a diffusers folder that has several, for example fp16.
        lora: a LoRA file (.safetensors of diffusers or kohya) to merge into the weights.
        lora_scale: strength of the LoRA.
        verify: first run the checkpoint in its own code too (diffusers or guided-diffusion) and compare the outputs.
    """
    with one_line_errors():
        from unet_denoiser.conversion import convert_checkpoint

        options = {"num_heads": num_heads, "head_dim": head_dim, "qkv_order": qkv_order, "variant": variant}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        given |= {"ema": True} if ema else {}
        print(convert_checkpoint(source, target, to, lora=lora, lora_scale=lora_scale, verify=verify, **given))


@contextmanager
def one_line_errors(
    kinds: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError),
) -> Iterator[None]:
    """Print what the user can mend as one line and exit with code 2; leave anything else alone."""
    try:
        yield
    except kinds as error:
        print(f"unet-denoiser: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nunet-denoiser: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


COMMANDS: dict[str, Callable[..., None]] = {"train": train, "sample": sample, "info": info, "convert": convert}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the command."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # torch's threads on a CPU wait for each other in a busy loop. On cores that something else uses too, a small
        # network's training step then took 5.5 s instead of 0.6 s with this limit; on free cores it is the same
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    what = "Train a diffusion model on your images, sample from it, look at networks and convert them."
    chosen(COMMANDS, what, args)()
