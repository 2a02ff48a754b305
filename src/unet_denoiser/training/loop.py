"""The training of a run: steps, checkpoints, previews, metrics and signals."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.data.transforms import UnreadableItemError
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.pretrained import write_pretrained
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import CLASS_NAMES, Pipeline
from unet_denoiser.training.checkpoints import read_checkpoint, read_metadata, select_averages
from unet_denoiser.training.distributed import is_sharded
from unet_denoiser.training.lora import save_lora
from unet_denoiser.training.run import Run
from unet_denoiser.training.tracking import LOG_EVERY, MetricsLog, log_to_trackers, plot, start_trackers
from unet_denoiser.training.trainer import Trainer, TrainingStep
from unet_denoiser.utils.files import remove_leftovers, write_json
from unet_denoiser.utils.images import save_grid
from unet_denoiser.utils.signals import TrainingInterrupted, watch_signals
from unet_denoiser.utils.terminal import quote

PREVIEW_SAMPLES = 16  # where classes do not decide the number
PREVIEW_STEPS = 25


def check_new(path: Path) -> None:
    """Raise FileExistsError if the path is a file, or a directory that holds a run or parts of one."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out={path} is a file; give a directory")
    if (path / "config.json").exists():
        raise FileExistsError(
            f"{path} already holds a run: train --resume {quote(path)} goes on with it; for a new one give another out"
        )
    if found := [name for name in ("checkpoints", "init", "model", "metrics.jsonl") if (path / name).exists()]:
        raise FileExistsError(f"{path} has {found[0]}, which a run would overwrite; give another out")


def load_trainer(run: Run, data: Any = None, model: UNet | None = None) -> Trainer:
    """Build a run's trainer and restore the latest checkpoint, if there is one.

    The default of `data` loads the run's; that of `model` is the network in init/, else one with random weights.
    """
    data = load_data(run.data) if data is None else data
    torch.manual_seed(run.training.seed)
    if model is None:
        init = run.path / "init"
        model = UNet.from_pretrained(init) if init.is_dir() else UNet.from_config(run.model)
    trainer = Trainer(model, run.process, data, run.training)
    if paths := run.checkpoints.paths():
        tensors, metadata = read_checkpoint(paths[-1])
        try:
            trainer.restore(tensors, metadata)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{paths[-1]} belongs to another network: {error}") from None
    return trainer


def train(run: Run, trainer: Trainer) -> Iterator[TrainingStep]:
    """Train to the last step and write checkpoints, previews and metrics; yields after every step.

    Raises:
        ValueError: another process trains in the directory.
        TrainingInterrupted: SIGTERM or SIGINT asked to stop; the step was finished and a checkpoint written.
        NonFiniteError, OSError: training cannot continue; the last good checkpoint is unchanged.
    """
    with _lock(run.path) if trainer.accelerator.is_main_process else nullcontext():
        metrics, signals = _prepare_directory(run, trainer), [0]

        def request_stop(number: int) -> None:
            trainer.stop, signals[0] = True, number

        with watch_signals(request_stop):
            for step in trainer.steps():
                _record(run, trainer, metrics, step)
                yield step
                if step.stop and step.step < trainer.config.steps:
                    raise TrainingInterrupted(max(signals), step.step)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other processes from training in the directory; ValueError if one does already."""
    from filelock import FileLock, Timeout

    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{path}: another process trains in it; wait until it ends") from None


def _prepare_directory(run: Run, trainer: Trainer) -> MetricsLog:
    """Write config.json, remove what a killed training left, and open metrics and trackers at the trainer's step."""
    metrics = MetricsLog(run.path / "metrics.jsonl", run.process.num_train_timesteps)
    if trainer.step:
        metrics.restore(read_metadata(run.checkpoints.find(str(trainer.step))))
    if trainer.accelerator.is_main_process:
        run.write()
        remove_leftovers(run.path)
        metrics.cut(trainer.step)
    start_trackers(trainer, run.path, run.to_dict())
    return metrics


def _record(run: Run, trainer: Trainer, metrics: MetricsLog, step: TrainingStep) -> None:
    """Log a step; save a checkpoint and a preview when they are due."""
    main, config, last = trainer.accelerator.is_main_process, trainer.config, step.step == trainer.config.steps
    metrics.add(step)
    if main and (last or step.step % LOG_EVERY == 0):
        log_to_trackers(trainer, metrics.write(step, trainer.skipped_steps, trainer.data_timer.wait_share()))
    if last or step.stop or step.step == 1 or step.step % config.checkpoint_every == 0:
        save(run, trainer, metrics)
    if last or step.step % config.preview_every == 0:
        if main or is_sharded(trainer.accelerator):  # with shards all processes must run the network
            try:
                preview(run, trainer)
            except UnreadableItemError as error:  # training itself replaces such items
                warnings.warn(f"no preview at step {step.step}: {error}", stacklevel=2)
        if main:
            plot(metrics.read(), run.path / "loss.png")


def save(run: Run, trainer: Trainer, metrics: MetricsLog) -> None:
    """Write a checkpoint, then the averaged weights; each file appears whole or not at all. Every process must call it.

    The first checkpoint of a training is read back and compared, so that a faulty disk is noticed at once.
    """
    tensors, metadata = trainer.state()
    weights = trainer.averaged_weights(tensors)
    if not trainer.accelerator.is_main_process:
        return
    metrics.sync()
    metadata |= metrics.state()
    path = run.checkpoints.write(tensors, metadata)
    if trainer.step == 1:
        run.checkpoints.verify(path, tensors, metadata)
    folder = run.path / "model"
    run.process.save_pretrained(folder)
    if run.model.num_classes and run.data.class_names:
        write_json(folder / CLASS_NAMES, list(run.data.class_names))
    write_pretrained(folder, run.model.to_dict(), weights)
    if trainer.config.lora_rank:
        save_lora(select_averages(tensors), run.model, run.path / "lora.safetensors")
    run.checkpoints.prune(trainer.config)


def preview(run: Run, trainer: Trainer) -> Path:
    """Sample with fixed seeds from the averaged weights into samples/, without an effect on training.

    Every process must call it if the weights are sharded.
    """
    pipeline = Pipeline(run.path, trainer.model, run.process, run.data)
    conditions = preview_conditions(run.model, trainer.data)
    if by_class := not conditions.given() and pipeline.class_names is not None:
        conditions = Conditions(class_labels=pipeline.labels(min(40, 4 * len(pipeline.class_names or []))))
    options: dict[str, Any] = conditions.given()
    seeds = range(len(next(iter(options.values()), range(PREVIEW_SAMPLES))))
    options["num_inference_steps"] = min(PREVIEW_STEPS, run.process.num_train_timesteps)
    with trainer.ema.swapped():
        x = sample(trainer.model, run.process, seeds=seeds, **options)
    path = run.path / "samples" / f"step-{trainer.step:08d}.png"
    if not trainer.accelerator.is_main_process:
        return path
    images = pipeline.decode(x)
    return pipeline.save_grid(images, path) if by_class else save_grid(images, path, data_range=pipeline.image_range)


def preview_conditions(config: UNetConfig, data: ImageDataset | StreamDataset) -> Conditions:
    """Return the conditions of 16 items, evenly spread over the data; none if there are only classes, or nothing."""
    names = [*config.conditions, *["concat"] * (data.concat_channels > 0)]
    if names in ([], ["class_labels"]):
        return Conditions()
    if isinstance(data, StreamDataset):
        return Conditions.stack(list(islice(data, PREVIEW_SAMPLES)), names)
    pool = torch.arange(len(data)) if data.buckets is None else torch.as_tensor(data.buckets[0])
    spread = torch.linspace(0, len(pool) - 1, min(PREVIEW_SAMPLES, len(pool))).long()
    return Conditions.stack([data[i] for i in pool[spread].tolist()], names)
