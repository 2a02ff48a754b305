"""Samples and edits for the page: a form becomes a GenerationRequest, and its picture forms step by step."""

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image

from unet_denoiser.app.form import MAX_CAPTION, MAX_IMAGES, MAX_STEPS, Form, check_whole
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.sampling.callbacks import LivePreview
from unet_denoiser.sampling.loop import Step
from unet_denoiser.sampling.pipeline.generation import GenerationRequest, generate
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.training.pipelines import load_pipeline
from unet_denoiser.utils.device import resolve_device

BATCH_PIXELS = 2**20  # of the images that are generated at a time: 64 of 128 x 128, 4 of 512 x 512
FRAME_SECONDS, FRAME_SHARE = 0.25, 0.2  # between pictures at least; share of the time that they may take


class Frame(NamedTuple):
    """A picture that forms, or the last one, and a line about it."""

    picture: Image.Image
    text: str
    is_last: bool


class Stopped(Exception):  # noqa: N818  # no error: the user asked to stop
    """Sampling was stopped at a step."""


class PipelineHolder:
    """Keeps the pipeline that was used last; one whose files have changed since is loaded anew."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._pipeline: Pipeline | None = None
        self._lock = threading.Lock()

    def load(self, source: str) -> Pipeline:
        """Load a pipeline, see `load_pipeline`, or return the one that is kept."""
        path = local_path(source)
        files = [path, path / "config.json", path / "model" / "model.safetensors"]
        key = (source, *(file.stat().st_mtime_ns if file.exists() else None for file in files[1:]))
        with self._lock:
            if self._pipeline is None or self._key != key:
                self._pipeline = None  # its memory is free before the next one needs some
                self._pipeline, self._key = load_pipeline(source, resolve_device("auto")), key
            return self._pipeline


def make_request(
    pipeline: Pipeline, form: Form, edit: EditingConfig | None = None, concat_image: Path | None = None
) -> GenerationRequest:
    """Return the request of a form; ValueError for a value that is out of range, in one line."""
    edit = edit or EditingConfig()
    count, seed = check_whole("number", form.count, 1, MAX_IMAGES), check_whole("seed", form.seed, 0, 2**31 - 1)
    options: dict[str, Any] = {"sampler": form.sampler} if form.sampler else {}
    if form.steps is not None:
        options["num_inference_steps"] = check_whole("steps", form.steps, 1, MAX_STEPS)
    if form.guidance is not None:
        options["guidance_scale"] = float(form.guidance)
    for name, text in (("caption", form.caption), ("negative_caption", form.negative_caption)):
        if len(text) > MAX_CAPTION:
            raise ValueError(f"{name} has {len(text)} letters; at most {MAX_CAPTION} are taken")
    caption, negative = form.caption.strip(), form.negative_caption.strip()
    takes_captions = pipeline.data.text_encoder is not None
    return GenerationRequest(
        edit,
        pipeline.sampling_config(**options),
        range(seed, seed + count),
        classes=form.classes,
        captions=(caption,) if caption and takes_captions else (),
        vector=_numbers(form.vector),
        concat_image=concat_image,
        negative_class=form.negative_class or None,
        negative_caption=negative or None,
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"vector={text!r} must be numbers, such as '0.5 -1'") from None


@dataclass
class _Work:
    """A generation in a thread of its own: the pictures it has made, and whether it is asked to stop."""

    frames: "Queue[Frame | BaseException]" = field(default_factory=Queue)
    stop: threading.Event = field(default_factory=threading.Event)


def stream(pipeline: Pipeline, request: GenerationRequest, stop: threading.Event) -> Iterator[Frame]:
    """Generate images, and yield the picture as it forms; the last frame has the finished one.

    Raises:
        Stopped: `stop` was set; the step was finished.
        ValueError, OSError: of `generate`, before the first frame.
    """
    work = _Work(stop=stop)
    thread = threading.Thread(target=_generate, args=(pipeline, request, work), daemon=True)
    thread.start()
    try:
        while True:
            try:
                frame = work.frames.get(timeout=0.5)
            except Empty:
                continue
            if isinstance(frame, BaseException):
                raise frame
            while not frame.is_last and not work.frames.empty():  # the viewer is slower than the network
                following = work.frames.get()
                if isinstance(following, BaseException):
                    raise following
                frame = following
            yield frame
            if frame.is_last:
                return
    finally:
        stop.set()  # the viewer may be gone
        thread.join()


def _generate(pipeline: Pipeline, request: GenerationRequest, work: _Work) -> None:
    """Send the frames of a generation; an exception goes to the thread that reads them."""
    try:
        with TemporaryDirectory(prefix="unet-denoiser-") as folder:
            draw = _Drawing(pipeline, request, Path(folder) / "samples.png")
            work.frames.put(_finish(pipeline, request, work, draw))
    except BaseException as error:
        work.frames.put(error)


def _finish(pipeline: Pipeline, request: GenerationRequest, work: _Work, draw: "_Drawing") -> Frame:
    """Generate images and send the picture as it forms; return the last frame."""
    begun, done, size = time.monotonic(), 0, pipeline.data.image_size
    is_edit, count = draw.is_edit, len(request.seeds)
    pixels = math.prod(size) if isinstance(size, tuple) else 1
    batch = max(1, min(count, 4 if is_edit else BATCH_PIXELS // pixels))
    total = len(Sampler(request.config, pipeline.process)) * -(-count // batch)

    def on_step(step: Step) -> None:
        nonlocal done
        done += 1
        if work.stop.is_set():
            raise Stopped(f"stopped after step {done}")
        preview(step)

    def show(x: Any) -> None:
        if draw.is_due():
            of = "" if is_edit else f" of {total}"  # edits leave out steps, or repeat them
            work.frames.put(Frame(draw(pipeline.decode(x)), f"step {done}{of}", is_last=False))

    preview = LivePreview(count, 1, show)
    images = generate(pipeline, request, batch_size=batch, on_step=on_step)
    said = f"{count} image{'s' * (count > 1)} in {time.monotonic() - begun:.1f} s"
    return Frame(draw(images), f"{said}, {done} steps of {request.config.sampler}", is_last=True)


class _Drawing:
    """Draws samples as one picture, and no more often than it pays."""

    def __init__(self, pipeline: Pipeline, request: GenerationRequest, file: Path) -> None:
        self.pipeline, self.request, self.file = pipeline, request, file
        self.is_edit = request.edit.image is not None or request.concat_image is not None
        self.next = 0.0

    def is_due(self) -> bool:
        return time.monotonic() >= self.next

    def __call__(self, images: Any) -> Image.Image:
        begun, request = time.monotonic(), self.request
        names = request.classes or request.captions
        columns = math.ceil(math.sqrt(len(images))) if self.is_edit else None
        self.pipeline.save_grid(images, self.file, names, columns=columns)
        with Image.open(self.file) as picture:
            picture.load()
        now = time.monotonic()
        self.next = now + max(FRAME_SECONDS, (now - begun) / FRAME_SHARE)
        return picture
