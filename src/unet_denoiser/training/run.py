"""A run directory: everything about one training, enough to go on with it or to sample from it.

RUN/config.json       all that was chosen: data, model, process, training
RUN/model/            the latest averaged weights, for UNet.from_pretrained, with process and class names beside them
RUN/lora.safetensors  the LoRA alone, where one is trained; model/ has it merged
RUN/init/             the network that training started from, with --init
RUN/checkpoints/      training states to go on from, one file each
RUN/samples/          pictures of samples with fixed seeds
RUN/.lock             held by the process that trains here
RUN/metrics.jsonl     loss, gradient norm, learning rate and more over the steps; RUN/loss.png shows them
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.training import TrainingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.data.load import load_data
from unet_denoiser.data.transforms import UnreadableItemError
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.pretrained import write_pretrained
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.training.checkpoints import Checkpoints, read_checkpoint, read_metadata
from unet_denoiser.training.finetuning import merge_lora_weights, save_lora
from unet_denoiser.training.previews import PREVIEWED, conditions_of_items
from unet_denoiser.training.tracking import LOG_EVERY, MetricsLog, log_to_trackers, plot, start_trackers
from unet_denoiser.training.trainer import Trainer, TrainingStep
from unet_denoiser.utils.files import read_json, remove_leftovers, write_atomically
from unet_denoiser.utils.images import save_grid
from unet_denoiser.utils.signals import TrainingInterrupted, watch_signals


def check_new(path: Path) -> None:
    """FileExistsError when the path is a file, or a directory that already holds a run."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out={path} is a file; give a directory")
    if (path / "config.json").exists():
        raise FileExistsError(
            f"{path} already holds a run: train --resume {path} goes on with it; for a new one give another out"
        )
    if found := [name for name in ("checkpoints", "init", "model", "metrics.jsonl") if (path / name).exists()]:
        raise FileExistsError(f"{path} has {found[0]}, which a run would overwrite; give another out")


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from training in the directory meanwhile; ValueError where one does."""
    from filelock import FileLock, Timeout

    path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{path}: another process trains in it; wait until it ends") from None


@dataclass(frozen=True)
class Run(Pipeline):
    """One training and its directory.

    Args:
        path, data, model, process: see `Pipeline`.
        training: how it is trained.
    """

    training: TrainingConfig

    # ---- on disk ---------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write `config.json`."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_atomically(self.path / "config.json", lambda path: path.write_text(text, encoding="utf-8"))

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {
            "unet_denoiser": version("unet-denoiser"),
            "data": asdict(self.data),
            "model": self.model.to_dict(),
            "process": self.process.to_dict(),
            "training": asdict(self.training),
        }

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read a run directory; FileNotFoundError or ValueError when it holds none."""
        path = Path(path)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no run: it has no config.json; give a directory that train wrote")
        config = read_json(path / "config.json")
        parts = ("data", "model", "process", "training")
        if missing := {name for name in parts if not isinstance(config.get(name), dict)}:
            raise ValueError(f"{path / 'config.json'} is not a run's: it lacks {', '.join(sorted(missing))}")
        try:
            data, training = DataConfig.from_dict(config["data"]), TrainingConfig(**config["training"])
        except TypeError as error:
            raise ValueError(f"{path / 'config.json'} has an option of another version: {error}") from None
        model, process = UNetConfig.from_dict(config["model"]), Diffusion.from_dict(config["process"])
        return cls(path, data, model, process, training)

    # ---- training --------------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Checkpoints:
        """The training states."""
        return Checkpoints(self.path / "checkpoints")

    def trainer(self, data: Any = None, model: UNet | None = None) -> Trainer:
        """A trainer at the run's latest checkpoint, or at the start where there is none.

        Args:
            data: the run's data, where they are loaded already.
            model: the network to start from, likewise (default: that of init/, or random weights).
        """
        if data is None:
            data = load_data(self.data)
        torch.manual_seed(self.training.seed)
        if model is None:
            has_start = (self.path / "init").is_dir()
            model = UNet.from_pretrained(self.path / "init") if has_start else UNet.from_config(self.model)
        trainer = Trainer(model, self.process, data, self.training)
        if paths := self.checkpoints.paths():
            tensors, facts = read_checkpoint(paths[-1])
            try:
                trainer.restore(tensors, facts)
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"{paths[-1]} belongs to another network: {error}") from None
        return trainer

    def train(self, trainer: Trainer) -> Iterator[TrainingStep]:
        """Train to the last step, writing checkpoints, previews and metrics on the way; yields after every step.

        Raises:
            ValueError: another process trains it.
            Interrupted: SIGTERM or SIGINT asked to stop; the step was finished and a checkpoint written.
            NotFinite, OSError: training cannot go on; the last good checkpoint is there.
        """
        with _alone(self.path) if trainer.accelerator.is_main_process else nullcontext():
            yield from self._train(trainer)

    def _train(self, trainer: Trainer) -> Iterator[TrainingStep]:
        main, training, signals = trainer.accelerator.is_main_process, trainer.config, [0]
        metrics = MetricsLog(self.path / "metrics.jsonl", self.process.num_train_timesteps)
        if trainer.step:
            metrics.restore(read_metadata(self.checkpoints.find(str(trainer.step))))
        if main:
            self.write()
            remove_leftovers(self.path)
            metrics.cut(trainer.step)
        start_trackers(trainer, self.path, self.to_dict())

        def stop(number: int) -> None:
            trainer.stop, signals[0] = True, number

        with watch_signals(stop):
            for step in trainer.steps():
                last = step.step == training.steps
                metrics.add(step)
                if main and (last or step.step % LOG_EVERY == 0):
                    log_to_trackers(
                        trainer, metrics.write(step, trainer.skipped_steps, trainer.data_timer.wait_share())
                    )
                if last or step.stop or step.step == 1 or step.step % training.checkpoint_every == 0:
                    self.save(trainer, metrics)
                if last or step.step % training.preview_every == 0:
                    if main or trainer.is_sharded:
                        try:
                            self.preview(trainer)
                        except UnreadableItemError as error:  # which training itself replaces
                            warnings.warn(f"no preview at step {step.step}: {error}", stacklevel=2)
                    if main:
                        plot(metrics.read(), self.path / "loss.png")
                yield step
                if step.stop and not last:
                    raise TrainingInterrupted(max(signals), step.step)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()

    def save(self, trainer: Trainer, metrics: MetricsLog) -> None:
        """Write a checkpoint, then the averaged weights, each whole or not at all; every process must call it.

        The first one of a training is read back and compared, so that what is wrong with the disk shows at once.
        """
        tensors, facts = trainer.state()
        weights = trainer.averaged_weights(tensors)
        if not trainer.accelerator.is_main_process:
            return
        metrics.sync()
        facts |= metrics.state()
        path = self.checkpoints.write(tensors, facts)
        if trainer.step == 1:
            self.checkpoints.verify(path, tensors, facts)
        self.process.save_pretrained(self.path / "model")
        if self.class_names is not None:
            text = json.dumps(self.class_names, ensure_ascii=False) + "\n"
            write_atomically(self.path / "model" / "class_names.json", lambda p: p.write_text(text, "utf-8"))
        write_pretrained(self.path / "model", self.model.to_dict(), weights)
        if trainer.config.lora_rank:
            lora = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
            save_lora(lora, self.model, self.path / "lora.safetensors")
        self.checkpoints.prune(trainer.config)

    def preview(self, trainer: Trainer) -> Path:
        """Sample with fixed seeds from the averaged weights into `samples/`; training is not touched.

        Every process must call it where the weights are in shards.
        """
        conditions = conditions_of_items(self.model, trainer.data)
        if by_class := not conditions and self.class_names is not None:
            conditions = {"class_labels": self.labels(min(40, 4 * len(self.class_names or [])))}
        count = len(next(iter(conditions.values()), range(PREVIEWED)))
        with trainer.ema.swapped():
            steps = min(25, self.process.num_train_timesteps)
            x = sample(trainer.model, self.process, seeds=range(count), num_inference_steps=steps, **conditions)
        path = self.path / "samples" / f"step-{trainer.step:08d}.png"
        if not trainer.accelerator.is_main_process:
            return path
        x = self.decode(x)
        return self.save_grid(x, path) if by_class else save_grid(x, path, data_range=self.picture_range)

    # ---- sampling --------------------------------------------------------------------------------------------------

    def load_model(self, checkpoint: str = "latest") -> UNet:
        """The averaged weights of a checkpoint, in evaluation mode.

        Args:
            checkpoint: "latest", "best" (see `keep_best`) or a step's number.

        Raises:
            FileNotFoundError: there is none, or it is no longer kept.
        """
        if not (self.path / "model" / "model.safetensors").is_file():
            raise FileNotFoundError(f"{self.path} has no model yet: its first checkpoint was not reached")
        if checkpoint == "latest":
            return UNet.from_pretrained(self.path / "model")
        tensors, _ = read_checkpoint(self.checkpoints.find(checkpoint))
        model = UNet.from_pretrained(self.path / ("init" if self.training.lora_rank else "model"))
        averages = {name.removeprefix("ema."): tensors[name] for name in tensors if name.startswith("ema.")}
        model.load_state_dict(merge_lora_weights(model.state_dict() | averages))
        return model

    def save_pipeline(self, path: Path) -> None:
        """Write a `DDPMPipeline` folder, which diffusers' `DiffusionPipeline.from_pretrained` opens.

        Raises:
            ValueError: a network that diffusers has no counterpart for (a learned null, for one), or
                self-conditioning, which its pipelines do not have.
        """
        import diffusers

        if self.process.self_conditioning:
            raise ValueError(f"self_conditioning=True: {self.path} has no counterpart among diffusers' pipelines")

        model = self.load_model()
        with TemporaryDirectory() as folder:
            export_checkpoint(model.state_dict(), model.config, Path(folder), "diffusers")
            unet = diffusers.UNet2DModel.from_pretrained(folder)
        pipeline: Any = diffusers.DDPMPipeline(unet, self.process.scheduler)
        pipeline.save_pretrained(path)

    def with_training(self, **changes: Any) -> Run:
        """The same run with other training options."""
        return replace(self, training=replace(self.training, **changes))

    def with_data(self, **changes: Any) -> Run:
        """The same run with other options of the data."""
        return replace(self, data=replace(self.data, **changes))
