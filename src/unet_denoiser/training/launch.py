"""From the options of the train command to a run and its trainer: `start_run` and `resume_run`."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unet_denoiser.config.base import per_axis
from unet_denoiser.config.data import DATA_CHANGEABLE, DATA_MOVABLE, DataConfig
from unet_denoiser.config.defaults import MAX_PASSES, architecture_for, default_learning_rate, default_steps
from unet_denoiser.config.distillation import DistillationConfig
from unet_denoiser.config.paths import expand_home, local_path
from unet_denoiser.config.presets import preset
from unet_denoiser.config.training import TRAINING_CHANGEABLE, TrainingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint_files import read_process
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import WRAPPERS, check_places, load_data, with_found_values
from unet_denoiser.data.summary import describe_data
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.fetch import fetch_model, fetch_pipeline
from unet_denoiser.models.pretrained import write_pretrained
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.pipeline.pipeline import find_scheduler_config
from unet_denoiser.training.distillation import GUIDANCE_DIM
from unet_denoiser.training.finetuning import LoadReport, guess_process, load_matching, with_image_size
from unet_denoiser.training.loop import check_new, load_trainer
from unet_denoiser.training.pipelines import read_pipeline
from unet_denoiser.training.run import Run, default_name
from unet_denoiser.training.trainer import Trainer
from unet_denoiser.utils.device import resolve_device
from unet_denoiser.utils.files import check_writable

TIMED_STEPS, TIMED_SECONDS = 20, 5.0  # steps that are timed, at most
PRECISIONS = {  # in the first lines, which say how a default can be changed
    "no": "float32",
    "bf16": "bfloat16 (float32 with --mixed-precision no)",
    "fp16": "float16 (float32 with --mixed-precision no)",
}
Say = Callable[[str], object]  # tells the user a line


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of the train command; to resume, `source` is where data are that moved, or None.

    Args:
        data, training, process, model: the options given, of `DataConfig`, `TrainingConfig`, `DiffusionConfig` and
            `UNetConfig`.
        distillation: makes a network of few steps out of `init`.
    """

    source: str | None = None
    out: Path | None = None
    init: Path | None = None
    preset: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    process: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    distillation: DistillationConfig | None = None


class Initialization(NamedTuple):
    """The start of a training: the architecture and weights of a preset or checkpoint, if any, and the process.

    `data` are options of the data, which a published pipeline gives: its size, autoencoder and text encoder.
    """

    config: UNetConfig | None
    network: UNet | None
    process: Diffusion
    messages: list[str]
    data: Mapping[str, Any] = {}  # never modified


def start_run(request: TrainRequest, say: Say) -> tuple[Run, Trainer]:
    """Return a new run and its trainer; ValueError or OSError if an option cannot work."""
    training = TrainingConfig(**request.training)
    source, folder = _absolute_source(request.source or "")
    out = request.out or Path("runs") / default_name(source, folder)
    check_new(out)
    check_writable(out)
    _check_outside(out, [folder, Path(expand_home(request.data.get("concat") or ""))])
    initial = initialization(request, training)
    data_config, data = _load_data(request, source, initial)
    say(describe_data(replace(data_config, source=request.source or ""), data))
    config = _choose_architecture(request, initial, data, on_cpu=resolve_device(training.device) == "cpu")
    rate = training.learning_rate or default_learning_rate(config.model_channels)
    training = replace(training, learning_rate=rate)
    run = Run(out, with_found_values(data_config, data), config, initial.process, training)
    seconds = None
    if "steps" not in request.training:
        run, seconds = _choose_steps(run, data, say)
    if initial.network is None:
        trainer = load_trainer(run, data)
    else:
        trainer, report = _load_initialized(run, data, initial.network)
        for message in (*initial.messages, f"{request.init}: {report}"):
            say(message)
    _introduce(run, trainer, say, seconds)
    return run, trainer


def _load_initialized(run: Run, data: ImageDataset | StreamDataset, network: UNet) -> tuple[Trainer, LoadReport]:
    """Return a trainer that starts from a network's weights, which are kept in init/, and what did not fit."""
    model = UNet.from_config(run.model)
    report = load_matching(model, network)
    if run.training.lora_rank and (changed := report.widened + report.missed):
        raise ValueError(
            f"lora_rank={run.training.lora_rank}: a LoRA would leave {changed[0]} untrained; use data that fit the "
            "checkpoint, or train all weights"
        )
    if run.process.distillation is not None:
        _begin_as_teacher(model, report)
    weights = {name: t.clone() for name, t in model.state_dict().items()}  # training changes the network's
    trainer = load_trainer(run, data, model)
    if trainer.accelerator.is_main_process:
        write_pretrained(run.path / "init", run.model.to_dict(), weights)
    return trainer, report


@torch.no_grad()
def _begin_as_teacher(model: UNet, report: LoadReport) -> None:
    """Let guidance that is built in have no effect at first; ValueError if the teacher does not fit the data."""
    changed = report.widened + [name for name in report.missed if not name.startswith("time_cond")]
    if changed:
        raise ValueError(f"the data do not fit the teacher, which lacks {changed[0]}; give data like those of its own")
    if model.time_cond is not None:
        model.time_cond.weight.zero_()


def resume_run(path: Path, request: TrainRequest, say: Say) -> tuple[Run, Trainer]:
    """Load a run and its trainer at the latest checkpoint; ValueError for a change of a fixed option."""
    fixed = [name for name in ("out", "init", "preset", "process", "model") if getattr(request, name)]
    fixed += sorted(set(request.training) - TRAINING_CHANGEABLE)
    fixed += sorted(set(request.data) - DATA_CHANGEABLE - DATA_MOVABLE)
    if fixed:
        valid = ", ".join(sorted(TRAINING_CHANGEABLE | DATA_CHANGEABLE))
        raise ValueError(f"{fixed[0]} cannot change with --resume; what can: {valid}")
    run = Run.load(path).with_training(**request.training)
    run = run.with_data(**_moved_data(run.data, request))
    check_places(run.data, f"{path}: its")
    trainer = load_trainer(run)
    if trainer.step > run.training.steps:
        raise ValueError(f"steps={run.training.steps}: {path} is already at step {trainer.step}")
    say(describe_data(run.data, trainer.data))
    _introduce(run, trainer, say)
    return run, trainer


def _moved_data(before: DataConfig, request: TrainRequest) -> dict[str, Any]:
    """Return the changes of a run's data; ValueError for a place of something that the run does not have."""
    changes = dict(request.data) | ({} if request.source is None else {"source": _absolute_source(request.source)[0]})
    for name in ("text_encoder", "vae", "concat"):
        folder = getattr(before, name) if name != "concat" else before.concat_kind and before.concat_kind.folder
        if name in changes and folder is None and changes[name] != getattr(before, name):
            raise ValueError(f"{name} cannot change with --resume: the run was trained without a folder for it")
        if name in changes and Path(changes[name]).exists():
            changes[name] = str(Path(changes[name]).absolute())
    return changes


def initialization(request: TrainRequest, training: TrainingConfig) -> Initialization:
    """Read the preset or checkpoint that a training starts from, and decide on the process."""
    init = request.init
    if request.preset and init:
        raise ValueError(
            f"preset={request.preset!r} and init={init}: give one of them; a checkpoint has its own architecture"
        )
    if training.lora_rank and not init:
        raise ValueError(f"lora_rank={training.lora_rank} needs --init CHECKPOINT: a LoRA changes a trained network")
    if not init:
        unbounded = {"clip_sample_range": None} if request.data.get("vae") else {}  # latents have no fixed range
        config = preset(request.preset) if request.preset else None
        return Initialization(config, None, Diffusion(**unbounded | dict(request.process)), [])
    run, data, saved = Run.find(init), dict[str, Any](), None
    if run is None and (found := fetch_pipeline(init)) is not None:
        network, saved, data = read_pipeline(found, request.data)
        parts = [name for name in WRAPPERS if name in data and name not in request.data]
        messages = [f"{init}: its {' and '.join(parts)} prepare the data"] * bool(parts)
    else:
        folder, messages = fetch_model(init) if run is None else run.model_folder, []
        network, saved = UNet.from_pretrained(folder), find_scheduler_config(folder)
        if saved is None:
            saved, told = guess_process(network.config, read_process(folder) if folder.is_file() else {})
            messages.append(f"{init}: no schedule beside it; {told} unless --process.* says else")
    if "distillation" in saved:
        raise ValueError(f"{init} was distilled, which more training would undo; give what it was distilled from")
    process = Diffusion.from_dict(saved, **request.process)
    process = process if request.distillation is None else process.distilled(request.distillation)
    return Initialization(network.config, network, process, messages, data)


def _absolute_source(source: str) -> tuple[str, Path]:
    """Return a source that is valid from any directory, and its path; an empty path if it is no local one."""
    if not source or source == "digits" or source.startswith("hf:"):
        return source, Path()
    path = local_path(source).absolute()
    return str(path), path


def _check_outside(out: Path, folders: list[Path]) -> None:
    """Raise ValueError if the run would lie in a folder of training images, where its own images would join them."""
    for folder in folders:
        if folder.name and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"out={out} lies in the folder {folder}, whose images the run's own would join; give a directory "
                "outside of it as out"
            )


def _load_data(
    request: TrainRequest, source: str, initial: Initialization
) -> tuple[DataConfig, ImageDataset | StreamDataset]:
    """Load the dataset, by default with the channels and size of the architecture that was chosen."""
    # a network for latents has neither the size nor the channels of the images
    base = None if request.data.get("vae") or initial.data else initial.config
    defaults: dict[str, Any] = {} if base is None else {"image_size": base.image_size}
    defaults |= {"channels": request.model.get("in_channels"), **initial.data}
    config = DataConfig(source, **defaults | dict(request.data))
    data = load_data(config)
    if data.captions and config.text_encoder is None:
        warnings.warn("the data have captions, which are not learned without a text_encoder", stacklevel=3)
    return config, data


def _choose_architecture(
    request: TrainRequest, initial: Initialization, data: ImageDataset | StreamDataset, on_cpu: bool
) -> UNetConfig:
    """Combine the options that were given, the preset or checkpoint, and what the data need."""
    size = request.model.get("image_size")
    if size is not None and per_axis(size, len(data.image_size)) != tuple(data.image_size):
        raise ValueError(f"model.image_size={size}: the data have {tuple(data.image_size)}; give image_size instead")
    base = with_image_size(initial.network.config, data.image_size) if initial.network else initial.config
    classes = None if data.class_names is None else len(data.class_names)
    options = {"vector_dim": data.vector_dim, "context_dim": data.context_dim, **request.model}
    if request.distillation is not None and request.distillation.draws_guidance:
        options["time_cond_dim"] = GUIDANCE_DIM
    channels = initial.process.channels(data.channels, data.concat_channels)
    return architecture_for(
        data.channels, data.image_size, classes, options, base=base, network_channels=channels, on_cpu=on_cpu
    )


def _choose_steps(run: Run, data: ImageDataset | StreamDataset, say: Say) -> tuple[Run, float | None]:
    """Return the run with the number of steps that suits data and device, and the seconds of a step on a CPU."""
    seconds = None
    if resolve_device(run.training.device) == "cpu":
        say("timing a few steps, to choose a number of them ...")
        seconds = time_steps(run, data)
    count = len(data) if isinstance(data, ImageDataset) else None
    return run.with_training(steps=default_steps(count, run.training.batch_size, seconds)), seconds


def time_steps(run: Run, data: ImageDataset | StreamDataset) -> float:
    """Return the seconds of a training step, the same on all processes; a network that is thrown away takes a few."""
    # a run of its own, so that the training begins as if nothing had been timed
    trial = run.with_training(steps=TIMED_STEPS, num_workers=0, max_bad_steps=TIMED_STEPS + 1)
    trainer, start, ends = load_trainer(trial, data), time.perf_counter(), []
    for step in trainer.steps():
        ends.append(time.perf_counter())
        trainer.stop = ends[-1] - start > TIMED_SECONDS  # which all processes see in the next step
        if step.stop:
            break
    median = statistics.median(b - a for a, b in pairwise(ends))  # without the first, which is slow
    return float(trainer.accelerator.gather(torch.tensor([median], device=trainer.accelerator.device)).max())


def _introduce(run: Run, trainer: Trainer, say: Say, seconds_per_step: float | None = None) -> None:
    """Say which network is trained how long, and where the run is."""
    training, accelerator = run.training, trainer.accelerator
    total = sum(p.numel() for p in trainer.model.parameters())
    precision = PRECISIONS[trainer.config.mixed_precision or "no"]
    compiled = ", compiled in the first step" if training.compile else ""
    widths = ", ".join(map(str, run.model.widths))
    say(f"network: {total:,} parameters, levels of {widths} channels; on {accelerator.device} in {precision}{compiled}")
    length = f"{training.steps:,} steps of {training.batch_size} images"
    if isinstance(trainer.data, ImageDataset):
        passes = training.steps * training.batch_size / len(trainer.data)
        times = f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"
        length += f", which shows each image {times} times"
        length += ", enough to learn it by heart" if passes > MAX_PASSES else ""
    if seconds_per_step is not None:
        minutes = max(1, round(training.steps * seconds_per_step / 60))
        length += f"; about {minutes} min at {seconds_per_step:.2g} s a step; --steps changes it"
    if trainer.step:
        length += f"; goes on after step {trainer.step:,}"
    if run.process.distillation is not None:
        say(f"distillation: into {run.process.distillation.describe_steps()}")
    say(f"training: {length}")
    say(f"run: {run.path}, with previews in {run.path / 'samples'}")
