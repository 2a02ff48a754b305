"""From a name to a pipeline: of a run, a saved model, a published pipeline or a single file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.paths import expand_home, local_path
from unet_denoiser.convert.checkpoint_files import CONFIG_NAME, read_process
from unet_denoiser.diffusion.process import Diffusion, StepRules
from unet_denoiser.models.fetch import PIPELINE_NAME
from unet_denoiser.models.layers.rules import prepare_to_sample
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.pipeline.pipeline import Pipeline, find_scheduler_config
from unet_denoiser.sampling.pipeline.published import Published, load_published, on_device, vae_factor
from unet_denoiser.training.finetuning import guess_process
from unet_denoiser.training.run import Run

# the steps of Stable Diffusion's schedule, which its single files do not tell
_STABLE_DIFFUSION = {"timestep_spacing": "leading", "steps_offset": 1}
_REFINER_DIM = 1280 + 5 * 256  # of the vector: pooled text, and five numbers with the aesthetic score


def load_pipeline(
    source: str | Path,
    device: str | torch.device = "cpu",
    *,
    checkpoint: str = "latest",
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Pipeline:
    """Load the pipeline that samples are made with.

    Args:
        source: a run directory; what `Pipeline.from_pretrained` takes; or a single file with the weights of a network.
        checkpoint: of a run, see `Run.load_model`.
        vae, text_encoder: of a single file: folders, also of pipelines that have them, or names on the hub.

    Raises:
        FileNotFoundError, ValueError: there is no such thing, or it cannot be used; in one line.
    """
    path = local_path(source)
    others = {"vae": vae, "text_encoder": text_encoder}
    if path.is_file():
        _refuse_checkpoint(path, checkpoint)
        return _load_file(path, device, others)
    if given := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"{given[0]}={others[given[0]]}: {path} is no single file, and has its own; leave it out")
    if (run := Run.find(path)) is not None:
        return run.load_pipeline(checkpoint, device)
    if not path.exists() and str(source).count("/") != 1:
        advice = "give a directory that train wrote, or a published pipeline's folder or hub name (owner/name)"
        raise FileNotFoundError(f"{path} holds no run: it does not exist; {advice}")
    if path.is_dir() and not any((path / name).is_file() for name in (CONFIG_NAME, PIPELINE_NAME)):
        Run.load(path)  # raises
    _refuse_checkpoint(path, checkpoint)
    return Pipeline.from_pretrained(source, device)


def read_pipeline(folder: Path, given: Mapping[str, Any]) -> tuple[UNet, dict[str, Any], dict[str, Any]]:
    """Read a published pipeline to train on: its network, its process as a scheduler's configuration, options of data.

    Args:
        given: options of the data that the user chose.

    Raises:
        ValueError: a network that is given more than captions or classes; as `load_published`.
    """
    model, process, data, published = load_published(folder)
    if published.task != "generation" or model.config.vector_dim is not None:
        what = "pooled text and sizes" if published.task == "generation" else "an image as its pipeline prepares it"
        own = f"{folder / 'unet'} can be trained on conditions of your own"
        raise ValueError(f"init={folder}: a {published.name} is given {what}, which training does not make; {own}")
    options = {name: getattr(data, name) for name in ("image_size", "text_encoder", "vae", "latent_mean", "latent_std")}
    if given.get("vae"):
        options |= {"latent_mean": None, "latent_std": None}
    return model, process.to_dict(), {name: value for name, value in options.items() if value is not None}


def _refuse_checkpoint(path: Path, checkpoint: str) -> None:
    if checkpoint != "latest":
        raise ValueError(f"checkpoint={checkpoint}: {path} is no run, so it has no checkpoints; leave it out")


def _load_file(path: Path, device: str | torch.device, others: dict[str, str | None]) -> Pipeline:
    """Load the network of a file, with the text encoder and autoencoder that it needs; ValueError without them."""
    model = prepare_to_sample(on_device(UNet.from_pretrained(path), device))
    config, told = model.config, read_process(path)
    schedule = find_scheduler_config(path)
    process = Diffusion.from_dict(guess_process(config, told)[0] if schedule is None else schedule)
    takes = {"vae": process.data_channels(config) == 4, "text_encoder": config.context_dim is not None}
    for name, is_needed in takes.items():
        if is_needed and others[name] is None:
            raise ValueError(f"{path} is a network alone, which needs a {name}; give its folder or hub name")
        if others[name] is not None and not is_needed:
            raise ValueError(f"{name}={others[name]}: {path} is a network that needs none; leave it out")
    published = _recognize(path, config, process) if takes["text_encoder"] else None
    if published is not None:
        process = Diffusion.from_dict(process.to_dict() | _STABLE_DIFFUSION)
        process.step_rules = StepRules(steps_offset=1, ends_noisy=True, keeps_noise=True)
    vae, encoder = (None if value is None else expand_home(value) for value in others.values())
    factor = 1 if vae is None else _find_factor(vae)
    data: dict[str, Any] = {"channels": process.data_channels(config) if vae is None else 3}
    data["image_size"] = tuple(factor * n for n in config.sizes)
    if published is None:
        data["class_names"] = tuple(map(str, range(config.num_classes or 0))) or None
    return Pipeline(path, model, process, DataConfig(str(path), vae=vae, text_encoder=encoder, **data), published)


def _find_factor(vae: str) -> int:
    place = Path(vae)
    folders = [folder for folder in (place / "vae", place / "vqvae", place) if (folder / CONFIG_NAME).is_file()]
    if not folders:
        raise FileNotFoundError(f"vae={vae} is no folder of an autoencoder; give one, or a pipeline's folder")
    return vae_factor(folders[0])


def _recognize(path: Path, config: Any, process: Diffusion) -> Published:
    """Return the pipeline of diffusers that a network for captions belongs to; ValueError for another one."""
    extra, channels = process.concat_channels(config), process.data_channels(config)
    family = "StableDiffusion" if config.vector_dim is None else "StableDiffusionXL"
    kinds = {0: ("generation", "Pipeline"), channels + 1: ("inpainting", "InpaintPipeline")}
    kinds |= {channels: ("translation", "InstructPix2PixPipeline")} if config.vector_dim is None else {}
    if extra not in kinds or config.num_classes is not None or config.time_cond_dim is not None:
        raise ValueError(
            f"{path}: a network of in_channels={config.in_channels} like this is not held as a single file"
        )
    task, ending = kinds[extra]
    score = config.vector_dim == _REFINER_DIM
    return Published(f"{family}{ending}", task, {}, has_score=score, zero_negative=not score)  # type: ignore[arg-type]
