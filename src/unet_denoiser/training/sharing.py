"""A run as a folder for others: the network in our format and in diffusers', a picture, and a card that explains it."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.models.fetch import MODEL_FOLDERS, PIPELINE_NAME, SHARED_KEY
from unet_denoiser.sampling.pipeline.generation import GenerationRequest, generate
from unet_denoiser.sampling.pipeline.pipeline import CLASS_NAMES, DATA_NAME, SAMPLING_FIELDS, Pipeline
from unet_denoiser.training.checkpoints import parse_step
from unet_denoiser.training.diffusers_copy import copy_folder, make_copy, public_name
from unet_denoiser.training.model_card import Card, Picture, read_figures, read_progress, write_card
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import read_json, write_atomically, write_json

CARD_NAME, PICTURE_NAME = "README.md", "samples.png"
GUIDANCE_SCALE = 2.0  # of a network with classes and a learned null
MAX_CLASSES, PER_CLASS, WITHOUT_CLASSES = 10, 4, 16  # images of the picture
SAMPLING_SECONDS = 120  # the picture has fewer images where these would take longer
# what a folder can hold; an upload deletes those of an earlier one that it does not replace
PARTS = ("*.json", "*.safetensors", "*.png", "unet/*", "scheduler/*", *MODEL_FOLDERS)


def share(run: Run, folder: Path, name: str, licence: str, device: str | torch.device = "cpu") -> str | None:
    """Write a run as a folder for others, whole or not at all; `Pipeline.from_pretrained` loads it.

    It has the network in our format and, where diffusers holds it, in that of diffusers; a picture of samples; and the
    card README.md, with the figures of `evaluate` if RUN/evaluation has them. An autoencoder and a text encoder are
    copied if the run has them in a folder; names on the hub stay names.

    Args:
        folder: must not exist.
        name: of the folder or hub repository, as the card's code has it.
        licence: as the hub names it.

    Returns:
        Why diffusers does not hold the network; None if it does.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: a folder that exists, or a run that cannot be read.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; give a new name")
    figures, pipeline = read_figures(run), run.load_pipeline(device=device)
    is_guided = pipeline.class_names is not None and pipeline.model.config.learned_null and not run.process.distillation
    scale = GUIDANCE_SCALE if is_guided else 1.0
    try:
        copy, lacks = make_copy(pipeline, scale), None
    except ValueError as error:
        copy, lacks = None, str(error)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        _write_own(pipeline, temporary, is_pipeline=copy is not None and pipeline.data.text_encoder is not None)
        if copy is not None:
            copy.write(temporary)
            if copy.kind is not None:  # so that the folder is not read as a pipeline of diffusers alone
                write_json(temporary / PIPELINE_NAME, read_json(temporary / PIPELINE_NAME) | {SHARED_KEY: True})
        picture = _write_picture(run, pipeline, scale, temporary / PICTURE_NAME)
        _forget_places(temporary)
        card = Card(name, licence, run, pipeline, read_progress(run), picture, copy, lacks, figures)
        write_card(card, temporary / CARD_NAME)

    write_atomically(folder, write)
    return lacks


def _write_own(pipeline: Pipeline, folder: Path, *, is_pipeline: bool) -> None:
    """Write network, process, class names and what sampling needs to know of the data, in our format.

    With `is_pipeline` autoencoder and text encoder are those of the pipeline of diffusers in the folder.
    """
    pipeline.model.save_pretrained(folder)
    pipeline.process.save_pretrained(folder)
    if pipeline.class_names is not None:
        write_json(folder / CLASS_NAMES, pipeline.class_names)
    data: dict[str, Any] = {field: getattr(pipeline.data, field) for field in SAMPLING_FIELDS}
    if is_pipeline:
        data |= {"vae": ".", "text_encoder": "."}
    else:
        data |= {"vae": _write_vae(pipeline, folder), "text_encoder": _write_text_encoder(pipeline.data, folder)}
    data["concat"] = pipeline.data.concat and public_name(pipeline.data.concat)
    write_json(folder / DATA_NAME, data)


def _forget_places(folder: Path) -> None:
    """Remove what diffusers and transformers write of the place that a part was loaded from."""
    for path in (*folder.rglob("config.json"), *folder.rglob("tokenizer_config.json"), *folder.glob(PIPELINE_NAME)):
        if "_name_or_path" in (config := read_json(path)):
            del config["_name_or_path"]
            write_json(path, config)


def _write_vae(pipeline: Pipeline, folder: Path) -> str | None:
    """Copy an autoencoder that lies in a folder; return its place in the shared one, or its name on the hub."""
    vae = pipeline.data.vae
    if vae is None or not Path(vae).exists():
        return vae
    pipeline.autoencoder.model.save_pretrained(folder / "vae")
    return "vae"


def _write_text_encoder(data: DataConfig, folder: Path) -> str | None:
    """Copy a text encoder that lies in a folder, alone or in a pipeline of diffusers, likewise."""
    if data.text_encoder is None or not Path(data.text_encoder).exists():
        return data.text_encoder
    copy_folder(Path(data.text_encoder), folder / "text_encoder", without=("unet", "scheduler", "vae", "vqvae"))
    return "text_encoder"


def _write_picture(run: Run, pipeline: Pipeline, guidance_scale: float, path: Path) -> Picture | None:
    """Write samples as one picture: new ones, or the last preview where they would need conditions of the data.

    None if the samples are no images, or there is no preview.
    """
    config = pipeline.model.config
    if not pipeline.makes_images:
        return None
    if list(config.conditions) not in ([], ["class_labels"]) or pipeline.data.concat is not None:
        previews = sorted((run.path / "samples").glob("step-*.png"), key=parse_step)
        if not previews:
            return None
        shutil.copyfile(previews[-1], path)
        return Picture(f"The preview of step {parse_step(previews[-1]):,}.", 0)
    names = (pipeline.class_names or [])[:MAX_CLASSES]
    sampling = pipeline.sampling_config(guidance_scale=guidance_scale)
    request = GenerationRequest(EditingConfig(), sampling, range(PER_CLASS * len(names) or WITHOUT_CLASSES), names)
    images = _generate(pipeline, request)
    pipeline.save_grid(images, path, names)
    guided = f", guidance of {guidance_scale:g}" if guidance_scale != 1 else ""
    rows = "; one row per class" if names else ""
    steps = f"{sampling.num_inference_steps} steps of {sampling.sampler}"
    return Picture(f"Seeds 0 to {len(images) - 1}, {steps}{guided}{rows}.", len(images), tuple(names), guidance_scale)


def _generate(pipeline: Pipeline, request: GenerationRequest) -> Tensor:
    """Return the images of a request, fewer of them if all would take minutes by the time of the first one."""
    begun, names = time.monotonic(), request.classes
    first = generate(pipeline, replace(request, seeds=request.seeds[:1]))
    count = min(len(request.seeds), max(1, int(SAMPLING_SECONDS / max(1e-9, time.monotonic() - begun))))
    if count == 1:
        return first
    turned = [*names[1:], *names[:1]]  # seed 1 has the second class
    others = replace(request, seeds=request.seeds[1:count], classes=turned)
    return torch.cat([first.cpu(), generate(pipeline, others).cpu()])
