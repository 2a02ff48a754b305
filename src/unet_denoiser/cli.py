"""The command `unet-denoiser`: parsing and printing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from unet_denoiser.config import UNetConfig
from unet_denoiser.memory_config import MemoryConfig
from unet_denoiser.options import (
    DataOptions,
    MemoryOptions,
    ModelOptions,
    OptionalName,
    OptionalNumber,
    OptionalOrder,
    OptionalPath,
    OptionalSize,
    ProcessOptions,
    TrainingOptions,
    show,
)
from unet_denoiser.recipe import (
    DATA_CHANGEABLE,
    TRAINING_CHANGEABLE,
    DataConfig,
    DeviceName,
    SamplerName,
    TrainingConfig,
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
        run, trainer = _resumed(resume, locals()) if resume else _started(str(data), locals())
        total = sum(p.numel() for p in trainer.model.parameters())
        images = f"{len(trainer.data):,} images" if hasattr(trainer.data, "__len__") else "a stream of images"
        say = print if trainer.accelerator.is_main_process else lambda text: None
        say(f"{run.path}: {images}, {total:,} parameters, on {trainer.accelerator.device}")
    with _one_line_ends(run.path), _progress(run, trainer) as bar:
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


def _started(source: str, given: dict[str, Any]) -> tuple[Any, Any]:
    from unet_denoiser.data import as_found, load_data
    from unet_denoiser.diffusion import Diffusion
    from unet_denoiser.finetuning import at_size, load_fitting, read_start
    from unet_denoiser.presets import architecture_for
    from unet_denoiser.presets import preset as preset_config
    from unet_denoiser.pretrained import write_pretrained
    from unet_denoiser.run import Run
    from unet_denoiser.unet import UNet

    preset, init, options = given["preset"], given["init"], dict(given["model"])
    if preset and init:
        raise ValueError(f"preset={preset!r} and init={init}: give one of them; a checkpoint has its own architecture")
    training, process = TrainingConfig(**given["training"]), Diffusion(**given["process"])
    if training.lora_rank and not init:
        raise ValueError(f"lora_rank={training.lora_rank} needs --init CHECKPOINT: a LoRA changes a trained network")
    base, start = preset and preset_config(preset), None
    if init:
        start, saved = read_start(init)
        base, process = start.config, Diffusion.from_dict((saved or process.to_dict()) | given["process"])
    chosen = {"channels": options.get("in_channels"), "image_size": base and base.image_size}
    data_config = DataConfig(source, **chosen | given["dataset"])
    data = load_data(data_config)
    classes = None if data.class_names is None else len(data.class_names)
    if start:
        base = at_size(start.config, data.image_size)
    conditions = {"vector_dim": data.vector_dim}
    config = architecture_for(data.channels, data.image_size, classes, conditions | options, base)
    if source != "digits" and not source.startswith("hf:"):
        data_config = replace(data_config, source=str(Path(source).absolute()))  # to be found from any directory
    place = Path(data_config.source.replace(":", "/"))
    out = given["out"] or Path("runs") / (place.name if place.is_dir() else place.stem)
    run = Run(out, as_found(data_config, data), config, process, training)
    run.check_new()
    model, report, weights = None, "", {}
    if start:
        model = UNet.from_config(config)
        report = load_fitting(model, start)
        weights = {name: t.clone() for name, t in model.state_dict().items()}
    trainer = run.trainer(data, model)
    if trainer.accelerator.is_main_process:
        if start:
            print(f"{init}: {report}")
            write_pretrained(out / "init", config.to_dict(), weights)
        run.write()
    return run, trainer


def _resumed(path: Path, given: dict[str, Any]) -> tuple[Any, Any]:
    from unet_denoiser.run import Run

    fixed = [name for name in ("out", "init", "preset", "process", "model") if given[name]]
    fixed += sorted(set(given["training"]) - TRAINING_CHANGEABLE) + sorted(set(given["dataset"]) - DATA_CHANGEABLE)
    if fixed:
        valid = ", ".join(sorted(TRAINING_CHANGEABLE | DATA_CHANGEABLE))
        raise ValueError(f"{fixed[0]} cannot change with --resume; what can: {valid}")
    run = Run.load(path).with_training(**given["training"]).with_data(**given["dataset"])
    trainer = run.trainer()
    if trainer.step > run.training.steps:
        raise ValueError(f"steps={run.training.steps}: {path} is already at step {trainer.step}")
    if trainer.accelerator.is_main_process:
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
    checkpoint: str = "latest",
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
        checkpoint: "latest", a step's number, or "best": the lowest smoothed training loss of those that are kept.
    """
    from tqdm import tqdm

    with one_line_errors():
        if num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1")
        from unet_denoiser.distribution import resolve_device
        from unet_denoiser.images import save_image, to_uint8
        from unet_denoiser.run import Run
        from unet_denoiser.sampling import sample as generate

        loaded = Run.load(run)
        model = loaded.load_model(checkpoint).to(resolve_device(device))
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


def info(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME_OR_RUN")],
    *,
    diagram: OptionalPath = None,
    memory: bool = False,
    step: MemoryOptions = {},  # noqa: B006
    device: DeviceName = "auto",
) -> None:
    """Show a network: its levels with sizes, widths, heads, parameters and FLOPs; with --memory, what training needs.

    Args:
        name: a preset's name, a run directory, or a directory with a saved model.
        diagram: also draw the network into this .svg file.
        memory: estimate the memory and the operations of a training step instead; the options below describe it, and
            a run has its own defaults for them.
        device: what it would be trained on; "auto" is a GPU where there is one here.
    """
    if memory:
        return _show_memory(name, step, device)
    with one_line_errors():
        if step:
            raise ValueError(f"{next(iter(step))}: the options of a training step need --memory")
        config, _ = _network(name)
        if diagram is not None:
            if diagram.suffix != ".svg":
                raise ValueError(f"diagram={diagram}: give a name that ends in .svg")
            from unet_denoiser.diagram import diagram as draw
            from unet_denoiser.files import write_atomically

            write_atomically(diagram, lambda path: path.write_text(draw(config), encoding="utf-8"))
    from unet_denoiser.summary import summarize, table

    print(table(summarize(config)))
    print("\n" + ", ".join(f"{k}={show(v)}" for k, v in asdict(config).items()))


def _network(name: str) -> tuple[UNetConfig, Any]:
    """The architecture that a name means, and the run it is of, if any."""
    from unet_denoiser.files import read_json
    from unet_denoiser.presets import PRESETS, preset
    from unet_denoiser.run import Run

    if name in PRESETS:
        return preset(name), None
    if (Path(name) / "model").is_dir() or (Path(name) / "metrics.jsonl").exists():
        run = Run.load(name)
        return run.model, run
    if (Path(name) / "config.json").is_file():
        return UNetConfig.from_dict(read_json(Path(name) / "config.json")), None
    raise ValueError(f"{name!r} is neither a run or model directory nor a preset: {', '.join(PRESETS)}")


def _show_memory(name: str, options: dict[str, Any], device: DeviceName) -> None:
    with one_line_errors():
        from unet_denoiser.distribution import resolve_device
        from unet_denoiser.memory import estimate, table

        config, run = _network(name)
        shared = ("batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "mixed_precision")
        given = {} if run is None else {key: getattr(run.training, key) for key in shared}
        about = MemoryConfig(**given | options)
        place = resolve_device("auto") if device == "auto" else device
        print(table(estimate(config, about, place), about, place))
        if run is not None and run.training.lora_rank:
            print("This is for training all weights; a LoRA, as this run's, has hardly any gradients and moments.")


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
    *,
    to: Literal["unet-denoiser", "diffusers", "pipeline", "ldm", "adm", "ddpm"] = "unet-denoiser",
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
        _exit(f"error: {error}", 2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        _exit("interrupted", 130)


@contextmanager
def _one_line_ends(path: Path) -> Iterator[None]:
    """The ways in which training may end before its last step: asked to, in trouble, or without a disk."""
    from unet_denoiser.interrupts import Interrupted
    from unet_denoiser.safety import NotFinite

    with one_line_errors((OSError, ImportError)):
        try:
            yield
        except Interrupted as stop:
            _exit(f"{path}: {stop}; to go on: unet-denoiser train --resume {path}", 128 + stop.number)
        except NotFinite as error:
            _exit(f"error: {error}; {path} has the last good checkpoint", 1)


def _exit(message: str, code: int) -> NoReturn:
    print(f"unet-denoiser: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "sample": sample,
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
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="unet-denoiser",
        description="Train a diffusion model on your images, sample from it, look at networks and convert them.",
        args=args,
    )
