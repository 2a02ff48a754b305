"""A run directory: everything about one training, enough to resume it or to sample from it.

RUN/config.json       all that was chosen: data, model, process, training
RUN/model/            the latest averaged weights, for UNet.from_pretrained, with process and class names beside them
RUN/lora.safetensors  the LoRA alone, if one is trained; model/ has it merged
RUN/init/             the network that training started from, with --init
RUN/checkpoints/      training states to resume from, one file each
RUN/samples/          previews: grids of samples with fixed seeds
RUN/.lock             held by the process that trains here
RUN/.process.json     its number, and the step that it began with; only while it trains
RUN/metrics.jsonl     loss, gradient norm, learning rate and more over the steps; RUN/loss.png shows them
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from unet_denoiser.config.data import DATA_CHANGEABLE, DATA_MOVABLE, DataConfig
from unet_denoiser.config.paths import local_path
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.training import TRAINING_CHANGEABLE, TrainingConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint import export_checkpoint
from unet_denoiser.diffusion.process import Diffusion
from unet_denoiser.models.layers.rules import prepare_to_sample
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.training.checkpoints import Checkpoints, parse_step, read_whole_checkpoint, select_averages
from unet_denoiser.training.lora import merge_lora_weights
from unet_denoiser.utils.files import read_json, write_json

PROCESS_NAME = ".process.json"
MODEL_STEP = "unet_denoiser_step"  # in the metadata of model.safetensors: the step of its weights


@dataclass(frozen=True)
class Run:
    """The description of one training, and its directory; `unet_denoiser.training.loop` trains it.

    Args:
        data: its size, channels and class names are those that were found.
    """

    path: Path
    data: DataConfig
    model: UNetConfig
    process: Diffusion
    training: TrainingConfig

    @classmethod
    def find(cls, path: str | Path) -> Self | None:
        """Load the run in a directory; None if it holds something else, such as a saved model, or does not exist."""
        file = local_path(path) / "config.json"
        return cls.load(path) if file.is_file() and "training" in read_json(file) else None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a run directory; FileNotFoundError or ValueError if it holds no run."""
        path = local_path(path)
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

    def write(self) -> None:
        """Write `config.json`."""
        write_json(self.path / "config.json", self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of `config.json`."""
        return {
            "unet_denoiser": version("unet-denoiser"),
            "data": asdict(self.data),
            "model": self.model.to_dict(),
            "process": self.process.to_dict(),
            "training": asdict(self.training),
        }

    def check_unchanged(self, kept: Mapping[str, Any]) -> None:
        """Raise ValueError if an option that --resume may not change is another one than a checkpoint keeps."""
        changeable = {"training": TRAINING_CHANGEABLE, "data": DATA_CHANGEABLE | DATA_MOVABLE}
        now = json.loads(json.dumps(self.to_dict()))
        for part in ("data", "model", "process", "training"):
            before = kept.get(part, {})
            fixed = (set(before) & set(now[part])) - changeable.get(part, frozenset())
            for name in sorted(name for name in fixed if not name.startswith("_")):  # as in _diffusers_version
                if before[name] != now[part][name]:
                    raise ValueError(
                        f"{self.path / 'config.json'} has {name}={now[part][name]!r} in {part!r}; the checkpoint has "
                        f"{before[name]!r}, and --resume cannot change it"
                    )

    def with_training(self, **changes: Any) -> Self:
        """Return the same run with other training options."""
        return replace(self, training=replace(self.training, **changes))

    def with_data(self, **changes: Any) -> Self:
        """Return the same run with other data options."""
        return replace(self, data=replace(self.data, **changes))

    @property
    def checkpoints(self) -> Checkpoints:
        """The training states."""
        return Checkpoints(self.path / "checkpoints")

    @property
    def model_folder(self) -> Path:
        """The folder of the latest averaged weights; FileNotFoundError before the first checkpoint."""
        if not (self.path / "model" / "model.safetensors").is_file():
            advice = f"; train --resume {self.path} writes what is missing" if self.checkpoints.paths() else ""
            raise FileNotFoundError(f"{self.path} has no model yet: its first checkpoint was not reached{advice}")
        return self.path / "model"

    def load_model(self, checkpoint: str = "latest") -> UNet:
        """Load the averaged weights of a checkpoint, in evaluation mode; FileNotFoundError if it is not kept.

        Args:
            checkpoint: "latest", "best" (see `keep_best`) or the number of a step.
        """
        latest = self.model_folder
        if checkpoint == "latest":
            newest = self._checkpoint_after_model()
            if newest is None:
                return UNet.from_pretrained(latest)
            checkpoint = str(parse_step(newest))
        tensors, _ = read_whole_checkpoint(self.checkpoints.find(checkpoint))
        model = UNet.from_pretrained(self.path / "init" if self.training.lora_rank else latest)
        model.load_state_dict(merge_lora_weights(model.state_dict() | select_averages(tensors)))
        return model

    def _checkpoint_after_model(self) -> Path | None:
        """Return the newest good checkpoint if model/ is behind it after a kill; None if not, or not known."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / "model" / "model.safetensors", "pt") as file:
                step = (file.metadata() or {}).get(MODEL_STEP)
        except SafetensorError:  # `from_pretrained` says so
            return None
        paths = self.checkpoints.paths()
        if step is None or not paths or parse_step(paths[-1]) <= int(step):
            return None
        found = self.checkpoints.read_newest()
        return found[0] if found and parse_step(found[0]) > int(step) else None

    def sampling_config(self, **options: Any) -> SamplingConfig:
        """Return a configuration, by default with the steps and guidance of a distilled network."""
        return SamplingConfig(**self.process.sampling_defaults | options)

    def load_pipeline(self, checkpoint: str = "latest", device: str | torch.device = "cpu") -> Pipeline:
        """Load everything that sampling needs, with the averaged weights of a checkpoint (see `load_model`)."""
        model = prepare_to_sample(self.load_model(checkpoint).to(device))
        return Pipeline(self.path, model, self.process, self.data)

    def save_pipeline(self, path: Path) -> None:
        """Write a `DDPMPipeline` folder, which diffusers' `DiffusionPipeline.from_pretrained` opens.

        ValueError if diffusers has no counterpart: for a learned null, self-conditioning or EDM, for example.
        """
        import diffusers

        if self.process.self_conditioning:
            raise ValueError(f"self_conditioning=True: {self.path} has no counterpart among diffusers' pipelines")
        if self.process.path == "edm":
            raise ValueError(f"path='edm': diffusers' pipelines do not scale the network's input, as {self.path} needs")
        if self.process.distillation is not None:
            raise ValueError(f"{self.path}: {self.process.distillation.describe()}, which DDPMPipeline does not have")
        model = self.load_model()
        with TemporaryDirectory() as folder:
            export_checkpoint(model.state_dict(), model.config, Path(folder), "diffusers")
            unet = diffusers.UNet2DModel.from_pretrained(folder)
        pipeline: Any = diffusers.DDPMPipeline(unet, self.process.scheduler)
        pipeline.save_pretrained(path)


def default_name(source: str, path: Path) -> str:
    """Return the name of a run on this source: that of the folder, of the file without its suffix, or of hf:NAME."""
    if not path.name:  # no local one, or "/"
        return Path(source.removeprefix("hf:").replace(":", "/")).name or "data"
    path = path.resolve() if path.name == ".." else path
    return (path.name if path.is_dir() else path.stem) or "data"
