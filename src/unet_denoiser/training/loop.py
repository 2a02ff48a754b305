"""The training of a run: steps, checkpoints, previews, metrics and signals."""

import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.data.contents import describe_changes
from unet_denoiser.data.dataloader import describe_worker_errors
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.data.transforms import UnreadableItemError
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.models.pretrained import write_pretrained
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.loop import Step, sample
from unet_denoiser.sampling.pipeline.pipeline import CLASS_NAMES, Pipeline
from unet_denoiser.training.checkpoints import read_metadata, select_averages
from unet_denoiser.training.distillation import Distillation
from unet_denoiser.training.distributed import is_sharded
from unet_denoiser.training.lora import save_lora
from unet_denoiser.training.run import MODEL_STEP, PROCESS_NAME, Run
from unet_denoiser.training.schedule import Schedule
from unet_denoiser.training.tracking import LOG_EVERY, MetricsLog, log_to_trackers, plot, start_trackers
from unet_denoiser.training.trainer import Trainer, TrainingStep
from unet_denoiser.utils.files import remove_leftovers, write_json
from unet_denoiser.utils.images import save_grid
from unet_denoiser.utils.processes import announced
from unet_denoiser.utils.signals import TrainingInterrupted, watch_signals
from unet_denoiser.utils.terminal import command

PREVIEW_SAMPLES = 16  # where classes do not decide the number
PREVIEW_STEPS = 25


def check_new(path: Path) -> None:
    """Raise FileExistsError if the path is a file, or a directory that holds a run or parts of one."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out={path} is a file; give a directory")
    if (path / "config.json").exists():
        raise FileExistsError(
            f"{path} already holds a run, which {command('train', '--resume', path)} goes on with; for a new one give "
            "another out"
        )
    if found := [name for name in ("checkpoints", "init", "model", "metrics.jsonl") if (path / name).exists()]:
        raise FileExistsError(f"{path} has {found[0]}, which a run would overwrite; give another out")


def load_trainer(run: Run, data: Any = None, model: UNet | None = None) -> Trainer:
    """Build a run's trainer and restore the latest good checkpoint, if there is one.

    The default of `data` loads the run's; that of `model` is the network in init/, else one with random weights. The
    start of a run that is distilled is its teacher. It warns of damaged checkpoints, and of data that changed since.

    Raises:
        ValueError: no checkpoint is good, or an option that cannot change is another than in the checkpoint.
    """
    data = load_data(run.data) if data is None else data
    torch.manual_seed(run.training.seed)
    if model is None:
        init = run.path / "init"
        model = UNet.from_pretrained(init) if init.is_dir() else UNet.from_config(run.model)
    distillation = _make_distillation(run, model) if run.process.distillation else None
    trainer = Trainer(model, run.process, data, run.training, distillation=distillation)
    if newest := run.checkpoints.read_newest():
        path, tensors, metadata = newest
        run.check_unchanged(metadata.get("run", {}))
        try:
            trainer.restore(tensors, metadata)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} belongs to another network: {error}") from None
        if changes := describe_changes(metadata.get("data", {}), trainer.contents):
            warnings.warn(f"the data changed since step {trainer.step}: {changes}; training goes on", stacklevel=2)
    return trainer


def _make_distillation(run: Run, start: UNet) -> Distillation:
    """Return the loss of a run that is distilled from the network it starts from."""
    pipeline, negative = Pipeline(run.path, deepcopy(start), run.process, run.data), None
    if start.config.context_dim and not start.config.learned_null:  # guidance's reference has an empty caption
        negative = pipeline.encode_captions([""])
    return Distillation(run.process, pipeline.model, negative)


def train(run: Run, trainer: Trainer) -> Iterator[TrainingStep]:
    """Train to the last step and write checkpoints, previews and metrics; yields after every step.

    It begins with what a kill left undone after the checkpoint that the trainer resumes from.

    Raises:
        ValueError: another process trains in the directory.
        TrainingInterrupted: SIGTERM or SIGINT asked to stop; the step was finished and a checkpoint written, without a
            preview.
        NonFiniteError, OSError: training cannot continue; the last good checkpoint is unchanged.
    """
    run = run.with_training(mixed_precision=trainer.config.mixed_precision)  # so that it is kept on other devices
    with _lock(run.path, trainer.step) if trainer.accelerator.is_main_process else nullcontext():
        metrics, signals = _prepare_directory(run, trainer), [0]

        def request_stop(number: int) -> None:
            trainer.stop, signals[0] = True, number

        schedule = Schedule(trainer.config)
        trainer.due = schedule.due
        with watch_signals(request_stop), describe_worker_errors(), closing(trainer.steps()) as steps:
            if trainer.step:
                _complete(run, trainer, metrics, schedule)
            for result in steps:
                step = _record(run, trainer, metrics, schedule, result)
                yield step
                if step.stop:
                    raise TrainingInterrupted(signals[0] or signal.SIGTERM, step.step)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()


@contextmanager
def _lock(path: Path, step: int) -> Iterator[None]:
    """Keep other processes from training in the directory, and say who trains there from which step on.

    ValueError if another process does already.
    """
    from filelock import FileLock, Timeout

    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0), announced(path / PROCESS_NAME, step=step):
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
        run.checkpoints.set_aside(trainer.step)
        metrics.cut(trainer.step)
    start_trackers(trainer, run.path, run.to_dict())
    return metrics


def _complete(run: Run, trainer: Trainer, metrics: MetricsLog, schedule: Schedule) -> None:
    """Write all that belongs to the trainer's checkpoint and that a kill may have left undone."""
    tensors, _ = trainer.state()
    _write_results(run, trainer, tensors)
    last = trainer.step == trainer.config.steps
    at_this_step = last or (schedule.preview.steps is not None and trainer.step % schedule.preview.steps == 0)
    missing = [path for path in (_preview_path(run, trainer.step), run.path / "loss.png") if not path.exists()]
    if at_this_step and missing:
        _show(run, trainer, metrics, schedule)


def _record(run: Run, trainer: Trainer, metrics: MetricsLog, schedule: Schedule, step: TrainingStep) -> TrainingStep:
    """Log a step; save a checkpoint and a preview when they are due. A stop during the preview is added to the step."""
    main, last = trainer.accelerator.is_main_process, step.step == trainer.config.steps
    metrics.add(step)
    if main and (last or step.step % LOG_EVERY == 0):
        log_to_trackers(trainer, metrics.write(step, trainer.skipped_steps, trainer.data_timer.wait_share()))
    saved, seconds = step.save or step.stop, None
    if saved:
        save(run, trainer, metrics)
    if step.preview and not step.stop:
        begun = time.monotonic()
        _show(run, trainer, metrics, schedule)
        seconds = time.monotonic() - begun
    if trainer.stop and trainer.accelerator.num_processes == 1:  # several agree in their next step
        step = step._replace(stop=True)
        if not saved:
            save(run, trainer, metrics)
            saved = True
    schedule.end_step(saved=saved, preview_seconds=seconds)
    return step._replace(next_checkpoint=schedule.next_checkpoint(step.step))


def _show(run: Run, trainer: Trainer, metrics: MetricsLog, schedule: Schedule) -> None:
    """Make a preview and the plot of the metrics; a stop ends the preview without a picture."""
    main, sharded = trainer.accelerator.is_main_process, is_sharded(trainer.accelerator)
    most = None if sharded else schedule.most_samples(PREVIEW_STEPS)
    if main or sharded:  # with shards all processes must run the network
        try:
            preview(run, trainer, most)
        except UnreadableItemError as error:  # training itself replaces such items
            warnings.warn(f"no preview at step {trainer.step}: {error}", stacklevel=2)
        except _PreviewStopped:
            return
    if main:
        plot(metrics.read(), run.path / "loss.png")


def save(run: Run, trainer: Trainer, metrics: MetricsLog) -> None:
    """Write a checkpoint, then the averaged weights; each file appears whole or not at all. Every process must call it.

    The first checkpoint of a training is read back and compared, so that a faulty disk is noticed at once.
    """
    tensors, metadata = trainer.state()
    if trainer.accelerator.is_main_process:
        metrics.sync()
        metadata |= metrics.state() | {"run": run.to_dict(), "data": trainer.contents}
        path = run.checkpoints.write(tensors, metadata)
        if trainer.step == 1:
            run.checkpoints.verify(path, tensors, metadata)
    _write_results(run, trainer, tensors)


def _write_results(run: Run, trainer: Trainer, tensors: Mapping[str, Tensor]) -> None:
    """Write what belongs to a checkpoint: averaged weights, LoRA, class names and process; prune the checkpoints.

    Every process must call it. The file of the weights comes last, so that its step says that all is written.
    """
    weights = trainer.averaged_weights(tensors)
    if not trainer.accelerator.is_main_process:
        return
    folder = run.path / "model"
    run.process.save_pretrained(folder)
    if run.model.num_classes and run.data.class_names:
        write_json(folder / CLASS_NAMES, list(run.data.class_names))
    if trainer.config.lora_rank:
        save_lora(select_averages(tensors), run.model, run.path / "lora.safetensors")
    write_pretrained(folder, run.model.to_dict(), weights, {MODEL_STEP: str(trainer.step)})
    run.checkpoints.prune(trainer.config)


class _PreviewStopped(Exception):  # noqa: N818  # no error: a signal asked to stop
    """A preview ended before its picture."""


def _preview_path(run: Run, step: int) -> Path:
    return run.path / "samples" / f"step-{step:08d}.png"


def preview(run: Run, trainer: Trainer, most: int | None = None) -> Path:
    """Sample with fixed seeds from the averaged weights into samples/, without an effect on training.

    Every process must call it if the weights are sharded. With more than `most` samples it warns and makes fewer.
    """
    pipeline = Pipeline(run.path, trainer.model, run.process, run.data)
    conditions = preview_conditions(run.model, trainer.data)
    if by_class := not conditions.given() and pipeline.class_names is not None:
        conditions = Conditions(class_labels=pipeline.labels(min(40, 4 * len(pipeline.class_names or []))))
    options: dict[str, Any] = conditions.given()
    count = len(next(iter(options.values()), range(PREVIEW_SAMPLES)))
    if most is not None and most < count:
        warnings.warn(f"{count} samples would take a preview minutes here; it has {most}", stacklevel=3)
        count, options = most, conditions.rows(slice(most)).given()
    options["num_inference_steps"] = min(PREVIEW_STEPS, run.process.num_train_timesteps)
    options |= run.process.sampling_defaults
    stoppable = not is_sharded(trainer.accelerator)

    def check_stop(step: Step) -> None:
        if trainer.stop and stoppable:
            raise _PreviewStopped

    with trainer.ema.swapped():
        x = sample(trainer.model, run.process, seeds=range(count), on_step=check_stop, **options)
    path = _preview_path(run, trainer.step)
    if not trainer.accelerator.is_main_process:
        return path
    images, captions = pipeline.decode(x), None if by_class else preview_captions(run.model, trainer.data)
    if by_class or captions:
        return pipeline.save_grid(images, path, (captions or [])[:count])
    return save_grid(images, path, data_range=pipeline.image_range)


def preview_captions(config: UNetConfig, data: ImageDataset | StreamDataset) -> list[str] | None:
    """Return the captions of the items of `preview_conditions`; None if they are not known or have no effect."""
    if config.context_dim is None or isinstance(data, StreamDataset) or data.captions is None:
        return None
    return [data.captions[i] for i in _preview_items(data)]


def preview_conditions(config: UNetConfig, data: ImageDataset | StreamDataset) -> Conditions:
    """Return the conditions of 16 items, evenly spread over the data; none if there are only classes, or nothing."""
    names = [*config.conditions, *["concat"] * (data.concat_channels > 0)]
    if names in ([], ["class_labels"]):
        return Conditions()
    if isinstance(data, StreamDataset):
        return Conditions.stack(list(islice(data, PREVIEW_SAMPLES)), names)
    return Conditions.stack([data[i] for i in _preview_items(data)], names)


def _preview_items(data: ImageDataset) -> list[int]:
    pool = torch.arange(len(data)) if data.buckets is None else torch.as_tensor(data.buckets[0])
    spread = torch.linspace(0, len(pool) - 1, min(PREVIEW_SAMPLES, len(pool))).long()
    return pool[spread].tolist()
