"""unet-denoiser: the U-Net of diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_denoiser.config import *  # noqa: F403
    from unet_denoiser.convert import *  # noqa: F403
    from unet_denoiser.data import *  # noqa: F403
    from unet_denoiser.diffusion import *  # noqa: F403
    from unet_denoiser.evaluation import *  # noqa: F403
    from unet_denoiser.export import *  # noqa: F403
    from unet_denoiser.models import *  # noqa: F403
    from unet_denoiser.models.diffusers_adapter import DiffusersUNet as DiffusersUNet
    from unet_denoiser.models.summary import summarize as summarize
    from unet_denoiser.sampling import *  # noqa: F403
    from unet_denoiser.sampling.pipeline import Pipeline as Pipeline
    from unet_denoiser.sampling.pipeline import export_pipeline as export_pipeline
    from unet_denoiser.training import *  # noqa: F403
    from unet_denoiser.utils.images import save_grid as save_grid

__version__ = "0.1.0"

_EXPORTS = {
    "config": (
        *("UNetConfig", "DiffusionConfig", "TrainingConfig", "DataConfig", "SamplingConfig", "EditingConfig"),
        *("DistillationConfig", "ExportConfig", "MemoryConfig", "preset", "list_presets"),
    ),
    "models": ("UNet", "ResBlock", "SinusoidalPosEmb", "SelfAttention", "CrossAttention"),
    "models.diffusers_adapter": ("DiffusersUNet",),
    "models.summary": ("summarize",),
    "diffusion": ("Diffusion", "training_losses", "Losses", "LossWeighting"),
    "data": ("load_data", "make_loader", "ImageDataset", "ArrayDataset", "ImageFolder"),
    "sampling": (
        *("sample", "sample_steps", "denoise", "Sampler", "Guidance", "Start", "TrajectoryRecorder"),
        *("image_to_image", "inpaint", "outpaint", "upscale", "interpolate", "invert", "regenerate"),
    ),
    "sampling.pipeline": ("Pipeline", "export_pipeline"),
    "export": ("ExportReport", "ExportRequest", "export_network"),
    "training": ("Trainer", "TrainingStep", "Distillation", "EMA", "Run", "load_trainer", "train"),
    "evaluation": ("evaluate", "load_extractor", "frechet_distance", "kernel_distance"),
    "convert": ("import_checkpoint", "export_state_dict", "export_checkpoint", "merge_lora"),
    "utils.images": ("save_grid",),
}
_HOME = {name: package for package, names in _EXPORTS.items() for name in names}
_RENAMED = {
    "ImageData": "ImageDataset",
    "ArrayData": "ArrayDataset",
    "FolderData": "ImageFolder",
    "Film": "TrajectoryRecorder",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Import each public name when it is first used, so that `import unet_denoiser` costs next to nothing."""
    name = _RENAMED.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
