"""Samples divided among processes that were launched together, and among files on disk.

Sample i depends on seed i alone. So processes work independently, and a missing file can be made at any time.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from unet_denoiser.config.base import DeviceName
from unet_denoiser.config.paths import local_path
from unet_denoiser.sampling.pipeline.generation import GenerationRequest, generate
from unet_denoiser.sampling.pipeline.npz_shards import Shards, digest_weights
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.utils.cache import digest
from unet_denoiser.utils.device import resolve_device
from unet_denoiser.utils.images import to_uint8

BATCHES_PER_FILE = 8


def request_slice(pipeline: Pipeline, request: GenerationRequest, indices: range) -> GenerationRequest:
    """Return the request for some of its samples, which keep their seeds, classes and captions."""
    classes = request.classes or (() if request.captions else tuple(pipeline.class_names or ()))
    seeds, start = request.seeds[indices.start : indices.stop], indices.start
    return replace(request, seeds=seeds, classes=_rotate(classes, start), captions=_rotate(request.captions, start))


def _rotate(names: Sequence[str], count: int) -> tuple[str, ...]:
    """Rotate names that are taken in turn, such that the one for sample `count` comes first."""
    first = count % len(names) if names else 0
    return (*names[first:], *names[:first])


def generate_distributed(pipeline: Pipeline, request: GenerationRequest, state: Any, **options: Any) -> Tensor:
    """Divide `generate` among the processes of Accelerate's `state`; all return all images, on the CPU.

    Each process makes a whole interpolation, whose images depend on each other.
    """
    count, processes = len(request.seeds), state.num_processes
    if processes == 1 or request.edit.interpolates:
        return generate(pipeline, request, **options).cpu()
    bounds = [count * i // processes for i in range(processes + 1)]
    indices = range(bounds[state.process_index], bounds[state.process_index + 1])
    part = [generate(pipeline, request_slice(pipeline, request, indices), **options).cpu()] if indices else []
    return torch.cat(gather_object(part))


def open_shards(pipeline: Pipeline, request: GenerationRequest, folder: Path, batch_size: int, state: Any) -> Shards:
    """Open the folder of a request's samples, which may hold some of them already; every process must call it.

    ValueError as of `Shards`, or if the samples depend on each other.
    """
    if request.edit.interpolates:
        raise ValueError(f"out={folder}: an interpolation is one picture; give its name, as out.png")
    with state.main_process_first():  # it writes the settings, or finds that they differ
        shards = Shards(folder, len(request.seeds), BATCHES_PER_FILE * batch_size, _settings(pipeline, request))
    state.wait_for_everyone()  # before the first new file, so that all processes find the same ones missing
    if state.is_main_process:
        shards.clean()
    state.wait_for_everyone()
    return shards


def _settings(pipeline: Pipeline, request: GenerationRequest) -> dict[str, Any]:
    """Return everything that the values of samples depend on, for `settings.json`."""
    edit = request.edit
    files = [file for file in (edit.image, edit.mask, request.concat_image) if file is not None]
    options = asdict(request.config) | asdict(edit)
    del options["compile"], options["backend"]  # which differ by rounding alone
    if options["backend_precision"] == "float32":
        del options["backend_precision"]
    if options["image_guidance_scale"] is None:  # as in folders of older versions, which lack it
        del options["image_guidance_scale"]
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()} | {
        "seed": request.seeds[0],
        "class": request.classes,
        "caption": request.captions,
        "vector": request.vector,
        "negative": (request.negative_class, request.negative_caption),
        "guide": None if request.guide is None else digest_weights(request.guide),
        "image_size": request.image_size,
        "pictures": digest(local_path(file).read_bytes() for file in files),
        "weights": digest_weights(pipeline.model),
        "process": pipeline.process.to_dict(),
    }


def generate_shards(
    pipeline: Pipeline, request: GenerationRequest, shards: Shards, state: Any, **options: Any
) -> Iterator[range]:
    """Write this process's share of the missing files; yields the sample indices of each."""
    for indices in shards.missing[state.process_index :: state.num_processes]:
        part = request_slice(pipeline, request, indices)
        shards.write(indices, _to_arrays(pipeline, part, generate(pipeline, part, **options)))
        yield indices


def _to_arrays(pipeline: Pipeline, request: GenerationRequest, x: Tensor) -> dict[str, np.ndarray]:
    """Return the arrays of a file: `images` (N, H, W[, C]) uint8 or other `samples`, `seeds`, and `labels` if any."""
    arrays = {"seeds": np.array(request.seeds)}
    if request.classes:
        arrays["labels"] = pipeline.labels(len(x), request.classes).numpy()
    if not pipeline.makes_images:
        return {"samples": x.cpu().numpy()} | arrays
    images = to_uint8(x, pipeline.image_range).movedim(1, -1).cpu().numpy()
    return {"images": images[..., 0] if images.shape[-1] == 1 else images} | arrays


def join_processes(name: DeviceName) -> tuple[Any, torch.device]:
    """Return Accelerate's `PartialState` of the processes launched together, and the device of this one."""
    device = torch.device(resolve_device(name))
    launched = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    state: Any = PartialState(cpu=device.type == "cpu")
    if launched and state.num_processes == 1:
        text = "accelerate launch starts one process on CPUs, whatever --num_processes; "
        warnings.warn(text + "torchrun --nproc_per_node starts many", stacklevel=2)
    return state, device if state.num_processes == 1 else state.device
