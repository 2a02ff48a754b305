"""The command `unet-denoiser sample`: parsing and writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from unet_denoiser.cli import options
from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.utils.terminal import printable

if TYPE_CHECKING:
    from torch import Tensor

    from unet_denoiser.sampling.loop import Step
    from unet_denoiser.sampling.pipeline.generation import GenerationRequest
    from unet_denoiser.sampling.pipeline.pipeline import Pipeline

DEFAULT_COUNT = 16


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    num_images: options.OptionalNumber = None,
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
    captions: Annotated[tuple[str, ...], tyro.conf.arg(name="caption"), tyro.conf.UseAppendAction] = (),
    vector: tuple[float, ...] = (),
    negative_class: options.OptionalName = None,
    negative_caption: options.OptionalName = None,
    guide_checkpoint: options.OptionalName = None,
    concat_image: options.OptionalPath = None,
    editing: options.EditingOptions = {},  # noqa: B006
    sampling: options.SamplingOptions = {},  # noqa: B006
    seed: int = 0,
    batch_size: int = 64,
    image_size: options.OptionalSize = None,
    out: options.OptionalPath = None,
    separate: bool = False,
    strip: bool = False,
    gif: bool = False,
    preview_every: options.OptionalNumber = None,
    device: DeviceName = "auto",
    checkpoint: str = "latest",
) -> None:
    """Generate images with a trained run, or edit one of yours.

    Args:
        run: a run directory.
        num_images: how many; image i depends on its seed SEED + i alone (default: 16, or with --invert one for each
            class or caption).
        classes: names of the classes to generate, in turn (default: all of the run's).
        captions: a text to draw; repeat the option for several, which then take turns.
        vector: the numbers that condition the samples, for a run trained with --vector-columns or `vectors`.
        negative_class: a class to lead away from, with --guidance-scale above 1.
        negative_caption: a text to lead away from, likewise.
        guide_checkpoint: a step's number, for autoguidance: guidance leads away from an earlier checkpoint of the run,
            instead of no class or caption.
        concat_image: the image to upscale or to translate, for a run trained with --concat downscaled:N or a folder.
        seed: seed of the first image.
        batch_size: images at a time; does not change them.
        image_size: one number or height and width (default: as trained), of the images or of --image.
        out: the picture (default: RUN/samples.png), one row per class or caption; or a folder, for any number of
            images: .npz files of some hundreds each, which the same command completes if it was interrupted.
        separate: also write every image to its own file, in a folder beside the picture.
        strip: also write x_t and predicted x0 of the first four images at up to ten steps, as OUT-strip.png.
        gif: also write the steps of the first sixteen images as an animation, OUT.gif.
        preview_every: write the picture every so many steps, with the predicted x0 of images that are not finished.
        device: "auto" takes a GPU if there is one.
        checkpoint: "latest", a step's number, or "best": the lowest smoothed training loss of those that are kept.
    """
    with one_line_errors():
        edit = EditingConfig(**editing)
        needs_ddim = edit.invert or edit.resample > 1  # another sampler that was given is refused by its name
        defaults: dict[str, Any] = {"sampler": "ddim"} if needs_ddim else {}
        SamplingConfig(**defaults | sampling)  # what is wrong is said before the imports, which take seconds
        _check_options(num_images, seed, out, preview_every, batch_size)
        from unet_denoiser.sampling.pipeline.distributed import join_processes
        from unet_denoiser.sampling.pipeline.generation import GenerationRequest
        from unet_denoiser.training.run import Run
        from unet_denoiser.utils.files import check_writable

        path = run / "samples.png" if out is None else out
        output = _Output(path, separate, strip, gif, preview_every)
        loaded = Run.load(run)
        config = SamplingConfig(**defaults | loaded.process.sampling_defaults | sampling)
        check_writable(path.parent if path.suffix else path)
        state, place = join_processes(device)
        pipeline = loaded.load_pipeline(checkpoint, place)
        _check_output(pipeline, output)
        count = num_images or DEFAULT_COUNT
        if edit.invert and not num_images:
            count = len(classes or captions or pipeline.class_names or "1")
        request = GenerationRequest(
            edit,
            config,
            range(seed, seed + count),
            classes=classes,
            captions=captions,
            vector=vector,
            concat_image=concat_image,
            image_size=image_size,
            negative_class=negative_class,
            negative_caption=negative_caption,
            guide=None if guide_checkpoint is None else loaded.load_model(guide_checkpoint).to(place),
        )
        write = _write_picture if path.suffix else _write_shards
        write(pipeline, request, output, batch_size, state)


class _Output(NamedTuple):
    """A picture or a folder to write, and the files beside the picture."""

    path: Path
    separate: bool
    strip: bool
    gif: bool
    preview_every: int | None

    @property
    def follows_steps(self) -> bool:
        """True if something shows the steps of the sampling."""
        return bool(self.strip or self.gif or self.preview_every)


def _check_options(
    num_images: int | None, seed: int, out: Path | None, preview_every: int | None, batch_size: int
) -> None:
    """Raise ValueError for what is wrong with the options, whatever the run."""
    for name, value in (("num_images", num_images), ("preview_every", preview_every), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not -(2**63) <= seed < 2**63 - (num_images or DEFAULT_COUNT):
        raise ValueError(f"seed={seed} must fit 64 bits")
    if out is not None and out.suffix not in (".png", ".npy", ""):
        raise ValueError(f"out={out}: images are PNG, other samples .npy; give a name that ends so, or a folder's")
    if out is not None and out.suffix and out.is_dir():
        raise ValueError(f"out={out} is a folder; give the picture's name")


def _check_output(pipeline: Pipeline, output: _Output) -> None:
    """Raise ValueError if the pipeline's samples cannot be written like that."""
    path = output.path
    if output.follows_steps and not pipeline.makes_images:
        raise ValueError(f"strip, gif and preview_every show images; {pipeline.path} makes none")
    if pipeline.makes_images and path.suffix == ".npy":
        raise ValueError(f"out={path}: {pipeline.path} makes images; give a name that ends in .png, or a folder's")
    if not path.suffix and (output.separate or output.follows_steps):
        raise ValueError(f"separate, strip, gif and preview_every go with one picture, not with out={path}")


def _write_picture(
    pipeline: Pipeline, request: GenerationRequest, output: _Output, batch_size: int, state: Any
) -> None:
    """Generate images; write them as one picture, and the files beside it."""
    from tqdm import tqdm

    from unet_denoiser.sampling.callbacks import LivePreview, TrajectoryRecorder
    from unet_denoiser.sampling.pipeline.distributed import generate_distributed
    from unet_denoiser.sampling.samplers import Sampler

    if output.follows_steps and state.num_processes > 1:
        raise ValueError(f"strip, gif and preview_every need one process, and these are {state.num_processes}")

    def save(images: Tensor) -> Path:
        columns = len(images) if request.edit.interpolates else None
        return pipeline.save_grid(images, output.path, request.classes or request.captions, columns=columns)

    count, recorder = len(request.seeds), TrajectoryRecorder(pipeline.decode, pipeline.image_range)
    callbacks: list[Callable[[Step], None]] = [recorder] * (output.strip or output.gif)
    if output.preview_every is not None:
        callbacks.append(LivePreview(count, output.preview_every, lambda x: save(pipeline.decode(x))))
    is_plain = request.edit.image is None and state.num_processes == 1  # else steps are left out, repeated or shared
    total = count * len(Sampler(request.config, pipeline.process)) if is_plain else None
    with tqdm(total=total, unit="step", disable=None if state.is_main_process else True) as bar:

        def on_step(step: Step) -> None:
            bar.update(len(step.x))
            for callback in callbacks:
                callback(step)

        images = generate_distributed(pipeline, request, state, batch_size=batch_size, on_step=on_step)
    if not state.is_main_process:
        return
    path = save(images)
    print(printable(path))
    if output.separate:
        print(printable(_write_separate(pipeline, request, images, path.with_name(f"{path.stem}-separate"))))
    if output.strip:
        print(printable(recorder.save_strip(path.with_name(f"{path.stem}-strip.png"))))
    if output.gif:
        print(printable(recorder.save_gif(path.with_suffix(".gif"))))


def _write_separate(pipeline: Pipeline, request: GenerationRequest, images: Tensor, folder: Path) -> Path:
    """Write every image to a file that is named by its seed, and by its class if it has one."""
    from unet_denoiser.utils.images import save_image, to_uint8

    classes = request.classes or (() if request.captions else pipeline.class_names or ())
    if request.edit.interpolates:
        classes = ()
    for i, image in enumerate(images):
        name = "-" + classes[i % len(classes)].replace("/", "_") if classes else ""
        pixels = to_uint8(image, pipeline.image_range) if pipeline.image_range else image
        save_image(pixels, folder / f"{request.seeds[i]:06d}{name}.png")
    return folder


def _write_shards(pipeline: Pipeline, request: GenerationRequest, output: _Output, batch_size: int, state: Any) -> None:
    """Generate this process's share of the samples and write them to .npz files in a folder."""
    from tqdm import tqdm

    from unet_denoiser.sampling.pipeline.distributed import generate_shards, open_shards

    folder = output.path
    shards = open_shards(pipeline, request, folder, batch_size, state)
    missing, done = sum(map(len, shards.missing)), 0
    shown = None if state.is_main_process else True
    try:
        with tqdm(total=missing // state.num_processes, unit="img", disable=shown) as bar:
            for indices in generate_shards(pipeline, request, shards, state, batch_size=batch_size):
                done += len(indices)
                bar.update(len(indices))
    except KeyboardInterrupt:
        count = f"{shards.count - missing + done:,}{'' if state.num_processes == 1 else ' or more'}"
        text = f"{folder}: interrupted with {count} of {shards.count:,} samples; the same command goes on"
        raise KeyboardInterrupt(text) from None
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{printable(folder)}: {shards.count:,} samples in {len(shards.parts())} files")
