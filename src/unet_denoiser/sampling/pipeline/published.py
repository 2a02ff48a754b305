"""Published pipelines of diffusers: which are held, and what their networks are given beside x_t and the tokens."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import diffusers
import torch

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.checkpoint_files import CONFIG_NAME
from unet_denoiser.diffusion.process import SCHEDULER_NAME, Diffusion, StepRules
from unet_denoiser.models.fetch import PIPELINE_NAME
from unet_denoiser.models.unet import UNet
from unet_denoiser.utils.files import read_json, write_json

Task = Literal["generation", "inpainting", "translation", "upscaling"]
# diffusers' classes: what their networks do, and the weights of guidance that they have by default
HELD: dict[str, tuple[Task, dict[str, float]]] = {
    "DDPMPipeline": ("generation", {}),
    "DDIMPipeline": ("generation", {}),
    "LDMPipeline": ("generation", {}),
    "LDMTextToImagePipeline": ("generation", {}),
    "StableDiffusionPipeline": ("generation", {"guidance_scale": 7.5}),
    "StableDiffusionImg2ImgPipeline": ("generation", {"guidance_scale": 7.5}),
    "StableDiffusionInpaintPipeline": ("inpainting", {"guidance_scale": 7.5}),
    "StableDiffusionInstructPix2PixPipeline": ("translation", {"guidance_scale": 7.5, "image_guidance_scale": 1.5}),
    "StableDiffusionUpscalePipeline": ("upscaling", {"guidance_scale": 9.0}),
    "StableDiffusionXLPipeline": ("generation", {"guidance_scale": 5.0}),
    "StableDiffusionXLImg2ImgPipeline": ("generation", {"guidance_scale": 5.0}),
    "StableDiffusionXLInpaintPipeline": ("inpainting", {"guidance_scale": 7.5}),
}
# what some of them set in a scheduler's configuration, whatever its file says
_NEEDED = {False: ("unet", "scheduler"), True: ("unet", "scheduler", "vae")}
_CORRECTIONS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1},
}
PUBLISHED_WIDTH = 256  # of each number of SDXL, embedded
SCORE, NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores, as diffusers gives them
IGNORED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker", "watermark")


@dataclass(frozen=True)
class Published:
    """A published pipeline, beside what every `Pipeline` has.

    Args:
        name: its class in diffusers.
        task: what its network does.
        parts: its components by name, with their classes; a single file has none.
        has_score: SDXL's numbers end with an aesthetic score, not with the size of the image.
        zero_negative: without a negative caption, SDXL's guidance leads away from zeros, not from an empty caption.
        low_res: of an upscaler, the process whose noise the small image gets.
    """

    name: str
    task: Task
    parts: dict[str, str]
    has_score: bool = False
    zero_negative: bool = True
    low_res: Diffusion | None = None

    def numbers(self, size: Sequence[int], *, negative: bool = False) -> list[float]:
        """Return SDXL's numbers for images of a size in pixels, neither scaled nor cropped (Podell et al. 2023)."""
        ending = [NEGATIVE_SCORE if negative else SCORE] if self.has_score else list(size)
        return [*size, 0, 0, *ending]


class Loaded(NamedTuple):
    """The parts of a `Pipeline` that `load_published` reads."""

    model: UNet
    process: Diffusion
    data: DataConfig
    published: Published


def read_published(folder: Path) -> Published:
    """Read the `model_index.json` of a folder; ValueError for a class that is not held, FileNotFoundError for a part.

    The safety checker and other parts that sampling does not need are ignored.
    """
    index = read_json(folder / PIPELINE_NAME)
    name = str(index.get("_class_name"))
    if name not in HELD:
        raise ValueError(f"{folder} is a {name}, which is not held; held are {', '.join(HELD)}")
    parts = {
        part: str(kind[1])
        for part, kind in index.items()
        if isinstance(kind, list) and len(kind) == 2 and kind[1] is not None and part not in IGNORED
    }
    needed = [*_NEEDED[name.startswith("Stable")], *(["low_res_scheduler"] if HELD[name][0] == "upscaling" else [])]
    for part in (*needed, *parts):
        if part not in parts or not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {part}, a part of its {name}; download the whole pipeline")
    low_res = Diffusion.from_pretrained(folder / "low_res_scheduler") if "low_res_scheduler" in parts else None
    flags = (bool(index.get("requires_aesthetics_score")), bool(index.get("force_zeros_for_empty_prompt", True)))
    return Published(name, HELD[name][0], parts, *flags, low_res)


def load_published(folder: Path, device: str | torch.device = "cpu") -> Loaded:
    """Load network, process and description of a pipeline's folder; errors as of `read_published` and of the parts."""
    published = read_published(folder)
    if "safety_checker" in _list_ignored(folder):
        warnings.warn(f"{folder}: its safety_checker is not run", stacklevel=4)
    with open_network(folder / "unet") as network:
        model = on_device(UNet.from_pretrained(network), device)
    process = read_process(folder, published.name)
    published = _fit_task(folder, published, model.config, process)
    vae = next((part for part in ("vae", "vqvae") if part in published.parts), None)
    factor = 1 if vae is None else vae_factor(folder / vae)
    stated = read_json(folder / "unet" / CONFIG_NAME).get("sample_size")
    sizes = model.config.sizes if stated is None else tuple(stated) if isinstance(stated, list) else (stated, stated)
    has_text = any(part in published.parts for part in ("text_encoder", "text_encoder_2", "bert"))
    classes = model.config.num_classes if published.task == "generation" else None
    data = DataConfig(
        str(folder),
        image_size=tuple(factor * n for n in sizes),
        channels=process.data_channels(model.config) if vae is None else 3,
        class_names=tuple(map(str, range(classes or 0))) or None,
        text_encoder=str(folder) if has_text else None,
        vae=None if vae is None else str(folder),
        **({} if vae is None else latent_statistics(folder / vae, published.name)),
    )
    return Loaded(model, process, data, published)


@contextmanager
def open_network(folder: Path) -> Iterator[Path]:
    """Provide the network's folder; a copy of it, if SDXL's numbers are embedded in another width than the published.

    Networks are given the embedded numbers, so their width matters to `Published.numbers` alone.
    """
    config = read_json(folder / CONFIG_NAME)
    if config.get("addition_time_embed_dim") in (None, PUBLISHED_WIDTH):
        yield folder
        return
    with TemporaryDirectory() as copy:
        for file in folder.iterdir():
            (Path(copy) / file.name).symlink_to(file.absolute())
        (Path(copy) / CONFIG_NAME).unlink()
        write_json(Path(copy) / CONFIG_NAME, config | {"addition_time_embed_dim": PUBLISHED_WIDTH})
        yield Path(copy)


def on_device(model: UNet, device: str | torch.device) -> UNet:
    """Move a network to a device; on a CPU, which is slow in half precision, in float32."""
    return model.to(device, torch.float32) if torch.device(device).type == "cpu" else model.to(device)


def read_process(folder: Path, name: str) -> Diffusion:
    """Read the process of a pipeline's scheduler, with the rules by which diffusers' DDIMScheduler takes its steps."""
    schedule = read_json(folder / "scheduler" / SCHEDULER_NAME) | _CORRECTIONS.get(name, {})
    process = Diffusion.from_dict(schedule)
    ddim: Any = diffusers.DDIMScheduler.from_config(schedule).config
    process.step_rules = StepRules(ddim.steps_offset, not ddim.set_alpha_to_one, keeps_noise=True)
    return process


def _fit_task(folder: Path, published: Published, config: UNetConfig, process: Diffusion) -> Published:
    """Return the pipeline with the task of its network; ValueError for one that takes what its class does not give."""
    name, channels, found = published.name, process.data_channels(config), process.concat_channels(config)
    wanted = {"generation": 0, "inpainting": channels + 1, "translation": channels, "upscaling": 3}[published.task]
    if config.time_cond_dim is not None:
        raise ValueError(f"{folder}: its network takes its guidance scale as an input (LCM), which is not held")
    if found == 0 and published.task == "inpainting":  # a network for generation, which inpaints like any other
        return replace(published, task="generation")
    if found != wanted:
        raise ValueError(f"{folder}: in_channels={config.in_channels}, but a {name} gives {channels + wanted}")
    return published


def latent_statistics(folder: Path, name: str) -> dict[str, Any]:
    """Return mean and standard deviation of latents, where an autoencoder states them; only SDXL uses them.

    With them, SDXL scales latents by `scaling_factor` too.
    """
    config = read_json(folder / CONFIG_NAME)
    mean, std, scale = config.get("latents_mean"), config.get("latents_std"), config.get("scaling_factor") or 1.0
    if mean is None or std is None:
        return {}
    if not name.startswith("StableDiffusionXL"):
        mean, std = [0.0] * len(mean), [1.0] * len(std)
    return {"latent_mean": tuple(mean), "latent_std": tuple(value / scale for value in std)}


def vae_factor(folder: Path) -> int:
    """Return the pixels along an axis for each latent of an autoencoder."""
    config = read_json(folder / CONFIG_NAME)
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def describe(folder: Path) -> str:
    """Return lines that say what a pipeline's folder holds; errors as of `read_published`."""
    published, process = read_published(folder), read_process(folder, read_published(folder).name)
    config = process.scheduler.config
    schedule = f"{process.prediction_type}, {config.beta_schedule} betas, {config.timestep_spacing} timesteps"
    lines = [f"{folder}: {published.name}, for {published.task}"]
    lines += [f"  {part}: {kind}{f' ({schedule})' * (part == 'scheduler')}" for part, kind in published.parts.items()]
    return "\n".join([*lines, *(f"  {part}: not used" for part in _list_ignored(folder))])


def _list_ignored(folder: Path) -> list[str]:
    index = read_json(folder / PIPELINE_NAME)
    return [part for part in IGNORED if isinstance(index.get(part), list) and index[part][-1] is not None]
