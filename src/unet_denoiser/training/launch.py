"""What the train command starts: a new run from data and options, or one to go on with."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DATA_CHANGEABLE, DataConfig
from unet_denoiser.config.defaults import architecture_for, default_learning_rate
from unet_denoiser.config.presets import preset as preset_config
from unet_denoiser.config.training import TRAINING_CHANGEABLE, TrainingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.data.load import load_data, with_found_values
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.pretrained import write_pretrained
from unet_denoiser.models.unet import UNet
from unet_denoiser.training.finetuning import load_matching, read_initial_checkpoint, with_image_size
from unet_denoiser.training.run import Run, check_new
from unet_denoiser.training.trainer import Trainer
from unet_denoiser.utils.device import resolve_device


def start_run(source: str, given: dict[str, Any]) -> tuple[Run, Trainer]:
    """A new run and its trainer; `given` has the arguments of the command."""
    options, training = dict(given["model"]), TrainingConfig(**given["training"])
    local = source != "digits" and not source.startswith("hf:")
    source = str(Path(source).absolute()) if local and source else source  # to be found from any directory
    place = Path(source.replace(":", "/"))
    out = given["out"] or Path("runs") / (place.name if place.is_dir() else place.stem)
    check_new(out)
    for folder in (Path(source if local else ""), Path(given["dataset"].get("concat") or "")):
        if folder.name and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"out={out} lies in the folder {folder}, whose pictures the run's own would join; give a directory "
                "outside of it as out"
            )
    latent = given["dataset"].get("vae") is not None
    base, start, process = initialization(given, training, latent)
    # of latents, a network has neither the pictures' size nor their channels
    fixed = {} if latent or base is None else {"image_size": base.image_size}
    data_config = DataConfig(source, **{"channels": options.get("in_channels")} | fixed | given["dataset"])
    data = load_data(data_config)
    if getattr(data, "captions", None) and data_config.text_encoder is None:
        warnings.warn("the data have captions, which are not learned without a text_encoder", stacklevel=2)
    if base and start:
        base = with_image_size(base, data.image_size)
    classes = None if data.class_names is None else len(data.class_names)
    conditions = {"vector_dim": data.vector_dim, "context_dim": data.context_dim}
    own = process.channels(data.channels, data.concat_channels)
    on_cpu = resolve_device(training.device) == "cpu"
    size = options.get("image_size")
    if size is not None and per_axis(size, len(data.image_size)) != tuple(data.image_size):
        raise ValueError(f"model.image_size={size}: the data have {tuple(data.image_size)}; give image_size instead")
    shared: dict[str, Any] = {"base": base, "network_channels": own, "on_cpu": on_cpu}
    config = architecture_for(data.channels, data.image_size, classes, conditions | options, **shared)
    rate = training.learning_rate or default_learning_rate(config.model_channels)
    training = replace(training, learning_rate=rate)
    run = Run(out, with_found_values(data_config, data), config, process, training)
    if start is None:
        trainer = run.trainer(data)
    else:
        model = UNet.from_config(config)
        fit = load_matching(model, start)
        if training.lora_rank and (changed := fit.widened + fit.missed):
            raise ValueError(
                f"lora_rank={training.lora_rank}: a LoRA would leave {changed[0]} untrained; use data that fit the "
                "checkpoint, or train all weights"
            )
        weights = {name: t.clone() for name, t in model.state_dict().items()}  # training changes the network's
        trainer = run.trainer(data, model)
        if trainer.accelerator.is_main_process:
            print(f"{given['init']}: {fit}")
            write_pretrained(out / "init", config.to_dict(), weights)
    return run, trainer


def initialization(
    given: dict[str, Any], training: TrainingConfig, latent: bool
) -> tuple[UNetConfig | None, UNet | None, Diffusion]:
    """What a preset or a checkpoint says: the architecture, the weights and the process."""
    preset, init = given["preset"], given["init"]
    if preset and init:
        raise ValueError(f"preset={preset!r} and init={init}: give one of them; a checkpoint has its own architecture")
    if training.lora_rank and not init:
        raise ValueError(f"lora_rank={training.lora_rank} needs --init CHECKPOINT: a LoRA changes a trained network")
    if not init:
        unbounded = {"clip_sample_range": None} if latent else {}  # latents have no fixed range
        return preset and preset_config(preset), None, Diffusion(**unbounded | given["process"])
    start, saved = read_initial_checkpoint(init)
    if saved is None:  # most published networks without a schedule beside them are DDPM's
        saved = Diffusion(prediction_type="epsilon", beta_schedule="linear").to_dict()
        print(
            f"{init}: no schedule beside it; taken to predict epsilon along the linear one unless --process.* says else"
        )
    changes = dict(given["process"])
    if "clip_sample_range" in changes:  # diffusers has two options for it
        changes["clip_sample"] = (clip := changes["clip_sample_range"]) is not None
        changes["clip_sample_range"] = clip or 1.0
    return start.config, start, Diffusion.from_dict(saved | changes)


def resume_run(path: Path, given: dict[str, Any]) -> tuple[Run, Trainer]:
    """A run to go on with and its trainer; `given` has the arguments of the command."""
    fixed = [name for name in ("out", "init", "preset", "process", "model") if given[name]]
    fixed += sorted(set(given["training"]) - TRAINING_CHANGEABLE) + sorted(set(given["dataset"]) - DATA_CHANGEABLE)
    if fixed:
        valid = ", ".join(sorted(TRAINING_CHANGEABLE | DATA_CHANGEABLE))
        raise ValueError(f"{fixed[0]} cannot change with --resume; what can: {valid}")
    run = Run.load(path).with_training(**given["training"]).with_data(**given["dataset"])
    trainer = run.trainer()
    if trainer.step > run.training.steps:
        raise ValueError(f"steps={run.training.steps}: {path} is already at step {trainer.step}")
    return run, trainer
