"""A run directory: everything about one training, enough to go on with it or to sample from it.

RUN/config.json       all that was chosen: data, model, process, training
RUN/model/            the latest averaged weights, for UNet.from_pretrained, with process and class names beside them
RUN/lora.safetensors  the LoRA alone, where one is trained; model/ has it merged
RUN/init/             the network that training started from, with --init
RUN/checkpoints/      training states to go on from, one file each
RUN/samples/          pictures of samples with fixed seeds
RUN/metrics.jsonl     loss, gradient norm, learning rate and more over the steps; RUN/loss.png shows them
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.checkpoints import Checkpoints, read_checkpoint, read_facts
from unet_denoiser.config import UNetConfig
from unet_denoiser.convert import save
from unet_denoiser.data import load_data
from unet_denoiser.data.conditioned import autoencoder, read_concat, read_mask, read_picture, text_encoder
from unet_denoiser.diffusion import Diffusion
from unet_denoiser.files import read_json, remove_leftovers, write_atomically
from unet_denoiser.finetuning import merged, save_lora
from unet_denoiser.images import MODES, save_grid
from unet_denoiser.interrupts import Interrupted, watch_signals
from unet_denoiser.pretrained import write_pretrained
from unet_denoiser.previews import PREVIEWED, conditions_of_items
from unet_denoiser.recipe import DataConfig, TrainingConfig
from unet_denoiser.sampling import sample
from unet_denoiser.sampling_request import concat_channels, data_channels
from unet_denoiser.tracking import LOG_EVERY, Metrics, log_to_trackers, plot, start_trackers
from unet_denoiser.training import Trainer, TrainingStep
from unet_denoiser.unet import UNet


def check_new(path: Path) -> None:
    """FileExistsError when the path is a file, or a directory that already holds a run."""
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"out={path} is a file; give a directory")
    if (path / "config.json").exists():
        raise FileExistsError(f"{path} already holds a run: train --resume {path} goes on with it")


@dataclass(frozen=True)
class Run:
    """One training and its directory.

    Args:
        path: the directory.
        data: what it is trained on, with size, channels and class names as they were found.
        model: the architecture.
        process: schedule, prediction type, data range.
        training: how it is trained.
    """

    path: Path
    data: DataConfig
    model: UNetConfig
    process: Diffusion
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
            Interrupted: SIGTERM or SIGINT asked to stop; the step was finished and a checkpoint written.
            NotFinite, OSError: training cannot go on; the last good checkpoint is there.
        """
        main, training, signals = trainer.accelerator.is_main_process, trainer.config, [0]
        metrics = Metrics(self.path / "metrics.jsonl", self.process.num_train_timesteps)
        if trainer.step:
            metrics.restore(read_facts(self.checkpoints.find(str(trainer.step))))
        if main:
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
                        self.preview(trainer)
                    if main:
                        plot(metrics.read(), self.path / "loss.png")
                yield step
                if step.stop and not last:
                    raise Interrupted(max(signals), step.step)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()

    def save(self, trainer: Trainer, metrics: Metrics) -> None:
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
        model.load_state_dict(merged(model.state_dict() | averages))
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
            save(model.state_dict(), model.config, Path(folder), "diffusers")
            unet = diffusers.UNet2DModel.from_pretrained(folder)
        pipeline: Any = diffusers.DDPMPipeline(unet, self.process.scheduler)
        pipeline.save_pretrained(path)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order, or None for a run without classes."""
        return list(self.data.class_names) if self.model.num_classes and self.data.class_names else None

    def labels(self, count: int, names: Sequence[str] = ()) -> Tensor:
        """(count,) labels that go round the classes `names` (default: all), so that label i does not depend on count.

        Raises:
            ValueError: a run without classes, or a name it does not have.
        """
        if self.class_names is None:
            raise ValueError(f"class={names[0] if names else None!r}: {self.path} was trained without classes")
        if unknown := [name for name in names if name not in self.class_names]:
            raise ValueError(f"class={unknown[0]!r} is not one of {', '.join(self.class_names)}")
        chosen = [self.class_names.index(name) for name in names or self.class_names]
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)])

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`context` and `context_mask` of captions, one row each, by the text encoder that the run was trained with.

        Raises:
            ValueError: a run that was trained without captions.
        """
        if self.data.text_encoder is None:
            raise ValueError(f"caption={captions[0]!r}: {self.path} was trained without captions (text_encoder)")
        context, mask = text_encoder(self.data)(captions)
        return {"context": context, "context_mask": mask}

    def read_concat(self, image: Path) -> Tensor:
        """(1, C2, H, W) for `sample` from a picture file; see `unet_denoiser.data.conditioned.read_concat`."""
        return read_concat(self.data, concat_channels(self.model, self.process), image)

    def read_picture(self, image: str | Path, size: Sequence[int] | None = None, *, as_it_is: bool = False) -> Tensor:
        """(1, C, H, W) of a picture file in [-1, 1], prepared as in training.

        Args:
            size: one number or height and width (default: as trained).
            as_it_is: keep the file's size.

        Raises:
            ValueError, OSError: a file that is no picture, or a run that makes none.
        """
        if not self.makes_pictures:
            raise ValueError(f"image={image}: {self.path} makes no pictures")
        return read_picture(self.data, self.picture_channels, image, self._pixels(size), as_it_is=as_it_is)

    def read_mask(self, mask: str | Path, size: Sequence[int]) -> Tensor:
        """(1, 1, H, W) bool of a picture file, True where it is white, prepared as a picture is."""
        return read_mask(self.data, mask, size)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) as the run's samples: its vae's latents, or as they are."""
        return pictures if self.data.vae is None else self._autoencoder.encode(pictures)

    def sample_size(self, pixels: Sequence[int] | None) -> tuple[int, ...] | None:
        """`image_size` for `sample` from one in pixels; ValueError where there are no such latents."""
        size = self._pixels(pixels)
        return size if size is None else tuple(n // self.latent_factor for n in size)

    def _pixels(self, size: Sequence[int] | None) -> tuple[int, ...] | None:
        if size is None:
            return None
        size = tuple(size) * (self.model.dims if len(size) == 1 else 1)
        if any(n < 1 or n % self.latent_factor for n in size) or len(size) != self.model.dims:
            multiples = f" multiples of {self.latent_factor}" if self.latent_factor > 1 else ""
            raise ValueError(f"image_size={size} must be 1 or {self.model.dims} positive numbers{multiples}")
        return size

    @cached_property
    def _autoencoder(self) -> Any:
        return autoencoder(self.data)

    @property
    def latent_factor(self) -> int:
        """Pixels a side for one of the samples' values: 1, but for latents."""
        return 1 if self.data.vae is None else self._autoencoder.factor

    @property
    def picture_channels(self) -> int:
        """Channels of what `decode` gives."""
        if self.data.vae is not None:
            return self._autoencoder.picture_channels
        return data_channels(self.model, self.process)

    @property
    def makes_pictures(self) -> bool:
        """Whether `decode` gives what a PNG can hold."""
        return self.model.dims == 2 and self.picture_channels in MODES

    def decode(self, x: Tensor) -> Tensor:
        """Samples as pictures: decoded by the run's vae where it was trained on latents, else as they are."""
        return x if self.data.vae is None else self._autoencoder.decode(x)

    @property
    def picture_range(self) -> tuple[float, float] | None:
        """The range of what `decode` gives; None for unbounded data."""
        return self.process.data_range if self.data.vae is None else (-1.0, 1.0)

    def save_grid(self, x: Tensor, path: Path, names: Sequence[str] = (), columns: int | None = None) -> Path:
        """One picture of samples, decoded: one row per class or caption, which took turns, or else a square.

        Args:
            columns: so many a row, in order, instead.
        """
        if columns is not None or (not names and self.class_names is None):
            return save_grid(x, path, columns, self.picture_range)
        classes = len(names or self.class_names or [])
        by_class = torch.cat([x[i::classes] for i in range(min(classes, len(x)))])
        return save_grid(by_class, path, max(1, -(-len(x) // classes)), self.picture_range)

    def with_training(self, **changes: Any) -> Run:
        """The same run with other training options."""
        return replace(self, training=replace(self.training, **changes))

    def with_data(self, **changes: Any) -> Run:
        """The same run with other options of the data."""
        return replace(self, data=replace(self.data, **changes))
