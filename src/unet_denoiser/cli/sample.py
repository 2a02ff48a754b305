"""The command that makes samples: parsing and writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from unet_denoiser.cli.errors import one_line_errors
from unet_denoiser.cli.options import (
    EditingOptions,
    OptionalName,
    OptionalNumber,
    OptionalPath,
    OptionalSize,
    SamplingOptions,
)
from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.sampling import SamplingConfig

DEFAULT_COUNT = 16


def sample(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    num_images: OptionalNumber = None,
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = (),
    captions: Annotated[tuple[str, ...], tyro.conf.arg(name="caption"), tyro.conf.UseAppendAction] = (),
    vector: tuple[float, ...] = (),
    negative_class: OptionalName = None,
    negative_caption: OptionalName = None,
    guide_checkpoint: OptionalName = None,
    concat_image: OptionalPath = None,
    editing: EditingOptions = {},  # noqa: B006
    sampling: SamplingOptions = {},  # noqa: B006
    seed: int = 0,
    batch_size: int = 64,
    image_size: OptionalSize = None,
    out: OptionalPath = None,
    separate: bool = False,
    strip: bool = False,
    gif: bool = False,
    preview_every: OptionalNumber = None,
    device: DeviceName = "auto",
    checkpoint: str = "latest",
) -> None:
    """Generate images with a trained run, or change one of your own.

    Args:
        run: a run directory.
        num_images: how many; image i has the seed SEED + i and depends on nothing else (default: 16, or with --invert
            one for each class or caption).
        classes: names of the classes to generate, in turn (default: all of the run's).
        captions: a text to draw; give the option again for more, which then take turns.
        vector: the numbers that condition the samples, for a run trained with --vector-columns or `vectors`.
        negative_class: a class to lead away from, with --guidance-scale above 1.
        negative_caption: a text to lead away from, likewise.
        guide_checkpoint: a step's number: guide by an earlier checkpoint of the run in place of no class or caption.
        concat_image: the picture to enlarge or to translate, for a run trained with --concat downscaled:N or a folder.
        seed: seed of the first image.
        batch_size: images at a time; does not change them.
        image_size: one number or height and width (default: as trained); that of the picture given, where one is.
        out: the picture (default: RUN/samples.png), one row per class or caption; or a folder, for any number: it gets
            .npz files of some hundreds each, and the same command goes on where one was interrupted.
        separate: also write every image to a file of its own, into a folder beside the picture.
        strip: also write how the first four of the first batch come about, x_t and predicted x0 at up to ten steps:
            OUT-strip.png.
        gif: also write how the first sixteen of the first batch come about: OUT.gif.
        preview_every: write the picture every so many steps, with what is predicted for the images under way.
        device: "auto" takes a GPU where there is one.
        checkpoint: "latest", a step's number, or "best": the lowest smoothed training loss of those that are kept.
    """
    with one_line_errors():
        edit = EditingConfig(**editing)
        needs_ddim = edit.invert or edit.resample > 1  # unless told otherwise, which then is refused by its name
        defaults: dict[str, Any] = {"sampler": "ddim"} if needs_ddim else {}
        config = SamplingConfig(**defaults | sampling)
        _check_output(num_images, seed, out, preview_every, batch_size)
        from unet_denoiser.sampling.pipeline.distributed import join_processes
        from unet_denoiser.sampling.pipeline.generation import GenerationRequest
        from unet_denoiser.training.run import Run
        from unet_denoiser.utils.files import check_writable

        loaded, extras = Run.load(run), _Extras(separate, strip, gif, preview_every)
        if extras.filmed and not loaded.makes_pictures:
            raise ValueError(f"strip, gif and preview_every show pictures; {run} makes none")
        if loaded.makes_pictures and out is not None and out.suffix == ".npy":
            raise ValueError(f"out={out}: {run} makes pictures; give a name that ends in .png, or a folder's")
        count = num_images or (len(classes or captions or loaded.class_names or "1") if edit.invert else DEFAULT_COUNT)
        place = run / "samples.png" if out is None else out
        check_writable(place.parent if place.suffix else place)
        model = loaded.load_model(checkpoint)
        state, where = join_processes(device)
        model = model.to(where)
        request = GenerationRequest(
            edit,
            config,
            range(seed, seed + count),
            classes,
            captions,
            vector,
            concat_image,
            image_size,
            negative_class=negative_class,
            negative_caption=negative_caption,
            guide=None if guide_checkpoint is None else loaded.load_model(guide_checkpoint).to(where),
        )
        if place.suffix:
            _draw(loaded, model, request, place, extras, batch_size, state)
        elif any(extras):
            raise ValueError(f"separate, strip, gif and preview_every go with one picture, not with out={out}")
        else:
            _fill(loaded, model, request, place, batch_size, state)


class _Extras(NamedTuple):
    """What is written beside the picture."""

    separate: bool
    strip: bool
    gif: bool
    preview_every: int | None

    @property
    def filmed(self) -> bool:
        return bool(self.strip or self.gif or self.preview_every)


def _check_output(
    num_images: int | None, seed: int, out: Path | None, preview_every: int | None, batch_size: int
) -> None:
    for name, value in (("num_images", num_images), ("preview_every", preview_every), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not -(2**63) <= seed < 2**63 - (num_images or DEFAULT_COUNT):
        raise ValueError(f"seed={seed} must fit 64 bits")
    if out is not None and out.suffix not in (".png", ".npy", ""):
        raise ValueError(f"out={out}: pictures are PNG, other samples .npy; give a name that ends so, or a folder's")
    if out is not None and out.suffix and out.is_dir():
        raise ValueError(f"out={out} is a folder; give the picture's name")


def _draw(run: Any, model: Any, request: Any, picture: Path, extras: _Extras, batch_size: int, state: Any) -> None:
    """Samples as one picture, with what else is wanted of them."""
    from tqdm import tqdm

    from unet_denoiser.sampling.callbacks import LivePreview, TrajectoryRecorder
    from unet_denoiser.sampling.pipeline.distributed import generate_distributed
    from unet_denoiser.sampling.samplers import Sampler

    if extras.filmed and state.num_processes > 1:
        raise ValueError(f"strip, gif and preview_every need one process, and these are {state.num_processes}")

    def save(x: Any) -> Path:
        columns = len(x) if request.edit.interpolates else None
        return run.save_grid(x, picture, request.classes or request.captions, columns=columns)

    count, film = len(request.seeds), TrajectoryRecorder(run.decode, run.picture_range)
    watch: list[Callable[[Any], None]] = [film] * (extras.strip or extras.gif)
    if extras.preview_every is not None:
        watch.append(LivePreview(count, extras.preview_every, lambda x: save(run.decode(x))))
    known = request.edit.image is None and state.num_processes == 1  # else steps are left out, repeated or shared
    total = count * len(Sampler(request.config, run.process)) if known else None
    with tqdm(total=total, unit="step", disable=None if state.is_main_process else True) as bar:

        def seen(step: Any) -> None:
            bar.update(len(step.x))
            for each in watch:
                each(step)

        x = generate_distributed(run, model, request, state, batch_size=batch_size, on_step=seen)
    if not state.is_main_process:
        return
    written = save(x)
    print(written)
    if extras.separate:
        print(_save_each(run, x, request, written.with_name(f"{written.stem}-separate")))
    if extras.strip:
        print(film.save_strip(written.with_name(f"{written.stem}-strip.png")))
    if extras.gif:
        print(film.save_gif(written.with_suffix(".gif")))


def _fill(run: Any, model: Any, request: Any, folder: Path, batch_size: int, state: Any) -> None:
    """Samples as files in a folder; the process's share of them."""
    from tqdm import tqdm

    from unet_denoiser.sampling.pipeline.distributed import generate_shards, open_shards

    shards = open_shards(run, model, request, folder, batch_size, state)
    missing = sum(map(len, shards.missing))
    done = 0
    shown = None if state.is_main_process else True
    try:
        with tqdm(total=missing // state.num_processes, unit="img", disable=shown) as bar:
            for part in generate_shards(run, model, request, shards, state, batch_size=batch_size):
                done += len(part)
                bar.update(len(part))
    except KeyboardInterrupt:
        there = shards.count - missing + done
        where = "" if state.num_processes == 1 else " or more"
        raise KeyboardInterrupt(
            f"{folder}: interrupted with {there:,}{where} of {shards.count:,} samples; the same command goes on"
        ) from None
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{folder}: {shards.count:,} samples in {len(shards.parts())} files")


def _save_each(run: Any, x: Any, request: Any, folder: Path) -> Path:
    """Every sample in a file named by its seed, and its class where it has one."""
    from unet_denoiser.utils.images import save_image, to_uint8

    classes = request.classes or (() if request.captions else run.class_names or ())
    if request.edit.interpolates:
        classes = ()
    for i, image in enumerate(x):
        name = "-" + classes[i % len(classes)].replace("/", "_") if classes else ""
        pixels = to_uint8(image, run.picture_range) if run.picture_range else image
        save_image(pixels, folder / f"{request.seeds[i]:06d}{name}.png")
    return folder
