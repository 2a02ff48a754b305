"""Samples shared out: among processes that were launched together, and among files on disk.

Sample i depends on seed i alone, so shares need no talk, and a file that is missing can be made at any time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from unet_denoiser.config.base import DeviceName
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.pipeline.generation import GenerationRequest, generate
from unet_denoiser.sampling.pipeline.npz_shards import Shards, digest_weights
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.utils.cache import digest
from unet_denoiser.utils.device import resolve_device
from unet_denoiser.utils.images import to_uint8

BATCHES = 8  # of a file


def request_slice(run: Pipeline, request: GenerationRequest, part: range) -> GenerationRequest:
    """Some of a request's samples, with the classes and captions whose turn it is."""
    classes = request.classes or (() if request.captions else tuple(run.class_names or ()))

    def turned(names: Any) -> tuple[str, ...]:
        first = part.start % len(names) if names else 0
        return (*names[first:], *names[:first])

    seeds = request.seeds[part.start : part.stop]
    return replace(request, seeds=seeds, classes=turned(classes), captions=turned(request.captions))


def generate_distributed(run: Pipeline, model: UNet, request: GenerationRequest, state: Any, **options: Any) -> Tensor:
    """`perform`, each process of Accelerate's `state` a share of the seeds; all get the whole, on the CPU.

    Interpolation, whose samples are one row, is done whole by each.
    """
    count, processes = len(request.seeds), state.num_processes
    if processes == 1 or request.edit.interpolates:
        return generate(run, model, request, **options).cpu()
    bounds = [count * i // processes for i in range(processes + 1)]
    mine = range(bounds[state.process_index], bounds[state.process_index + 1])
    share = [generate(run, model, request_slice(run, request, mine), **options).cpu()] if mine else []
    return torch.cat(gather_object(share))


def open_shards(
    run: Pipeline, model: UNet, request: GenerationRequest, folder: Path, batch_size: int, state: Any
) -> Shards:
    """The folder of a request's samples, which may have some of them; every process must call it.

    Raises:
        ValueError: as `Shards`, or samples that depend on each other.
    """
    edit = request.edit
    if edit.interpolates:
        raise ValueError(f"out={folder}: samples between two others are one picture; give its name, as out.png")
    files = [file for file in (edit.image, edit.mask, request.concat_image) if file is not None]
    options = asdict(request.config) | asdict(edit)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    settings |= {
        "seed": request.seeds[0],
        "class": request.classes,
        "caption": request.captions,
        "vector": request.vector,
        "negative": (request.negative_class, request.negative_caption),
        "guide": None if request.guide is None else digest_weights(request.guide),
        "image_size": request.image_size,
        "pictures": digest(Path(file).read_bytes() for file in files),
        "weights": digest_weights(model),
        "process": run.process.to_dict(),
    }
    del settings["compile"]
    with state.main_process_first():  # it writes the settings, or finds that they are others
        shards = Shards(folder, len(request.seeds), BATCHES * batch_size, settings)
    state.wait_for_everyone()  # before the first new file, so that all have found the same ones missing
    if state.is_main_process:
        shards.clean()
    state.wait_for_everyone()
    return shards


def generate_shards(
    run: Pipeline, model: UNet, request: GenerationRequest, shards: Shards, state: Any, **options: Any
) -> Iterator[range]:
    """Make this process's share of the files that are missing; yields the samples' numbers after each."""
    for part in shards.missing[state.process_index :: state.num_processes]:
        own = request_slice(run, request, part)
        shards.write(part, _arrays(run, own, generate(run, model, own, **options)))
        yield part


def _arrays(run: Pipeline, request: GenerationRequest, x: Tensor) -> dict[str, np.ndarray]:
    """What a file holds: pictures (N, H, W[, C]) of 0 to 255, as `load_data` reads them, or other samples as they are.

    And their seeds, and the labels of those that have a class.
    """
    arrays = {"seeds": np.array(request.seeds)}
    if request.classes:
        arrays["labels"] = run.labels(len(x), request.classes).numpy()
    if not run.makes_pictures:
        return {"samples": x.cpu().numpy()} | arrays
    images = to_uint8(x, run.picture_range).movedim(1, -1).cpu().numpy()
    return {"images": images[..., 0] if images.shape[-1] == 1 else images} | arrays


def join_processes(name: DeviceName) -> tuple[Any, torch.device]:
    """Accelerate's `PartialState` of the processes that were launched together, and the device of this one."""
    device = torch.device(resolve_device(name))
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    state: Any = PartialState(cpu=device.type == "cpu")
    if told and state.num_processes == 1:
        warnings.warn(
            "accelerate launch starts one process on CPUs, whatever --num_processes; torchrun --nproc_per_node starts "
            "many",
            stacklevel=2,
        )
    return state, device if state.num_processes == 1 else state.device
