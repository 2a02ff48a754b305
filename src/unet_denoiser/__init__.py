"""unet-denoiser: the U-Net of diffusion models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unet_denoiser.adapter import DiffusersUNet as DiffusersUNet
    from unet_denoiser.attention import CrossAttention as CrossAttention
    from unet_denoiser.attention import SelfAttention as SelfAttention
    from unet_denoiser.config import UNetConfig as UNetConfig
    from unet_denoiser.convert.lora import merge_lora as merge_lora
    from unet_denoiser.data import ArrayData as ArrayData
    from unet_denoiser.data import FolderData as FolderData
    from unet_denoiser.data import ImageData as ImageData
    from unet_denoiser.data import load_data as load_data
    from unet_denoiser.diffusion import Diffusion as Diffusion
    from unet_denoiser.editing import image_to_image as image_to_image
    from unet_denoiser.editing import inpaint as inpaint
    from unet_denoiser.editing import outpaint as outpaint
    from unet_denoiser.editing import upscale as upscale
    from unet_denoiser.ema import EMA as EMA
    from unet_denoiser.evaluation import evaluate as evaluate
    from unet_denoiser.features import load_extractor as load_extractor
    from unet_denoiser.guidance import Guidance as Guidance
    from unet_denoiser.images import save_grid as save_grid
    from unet_denoiser.interpolation import interpolate as interpolate
    from unet_denoiser.inversion import invert as invert
    from unet_denoiser.inversion import regenerate as regenerate
    from unet_denoiser.layers import ResBlock as ResBlock
    from unet_denoiser.layers import SinusoidalPosEmb as SinusoidalPosEmb
    from unet_denoiser.presets import list_presets as list_presets
    from unet_denoiser.presets import preset as preset
    from unet_denoiser.recipe import DiffusionConfig as DiffusionConfig
    from unet_denoiser.recipe import TrainingConfig as TrainingConfig
    from unet_denoiser.recipe_data import DataConfig as DataConfig
    from unet_denoiser.recipe_sampling import SamplingConfig as SamplingConfig
    from unet_denoiser.run import Run as Run
    from unet_denoiser.samplers import Sampler as Sampler
    from unet_denoiser.sampling import denoise as denoise
    from unet_denoiser.sampling import sample as sample
    from unet_denoiser.sampling import sample_steps as sample_steps
    from unet_denoiser.sampling_request import Start as Start
    from unet_denoiser.summary import summarize as summarize
    from unet_denoiser.training import Trainer as Trainer
    from unet_denoiser.unet import UNet as UNet
    from unet_denoiser.watching import Film as Film

__version__ = "0.1.0"

_WHERE = {
    "UNet": "unet",
    "UNetConfig": "config",
    "ResBlock": "layers",
    "SinusoidalPosEmb": "layers",
    "SelfAttention": "attention",
    "CrossAttention": "attention",
    "Diffusion": "diffusion",
    "sample": "sampling",
    "denoise": "sampling",
    "Start": "sampling",
    "Sampler": "samplers",
    "SamplingConfig": "recipe_sampling",
    "Guidance": "guidance",
    "image_to_image": "editing",
    "inpaint": "editing",
    "outpaint": "editing",
    "upscale": "editing",
    "interpolate": "interpolation",
    "invert": "inversion",
    "regenerate": "inversion",
    "sample_steps": "sampling",
    "Film": "watching",
    "load_data": "data",
    "ArrayData": "data",
    "FolderData": "data",
    "ImageData": "data",
    "EMA": "ema",
    "evaluate": "evaluation",
    "load_extractor": "features",
    "Trainer": "training",
    "TrainingConfig": "recipe",
    "DataConfig": "recipe_data",
    "DiffusionConfig": "recipe",
    "Run": "run",
    "save_grid": "images",
    "list_presets": "presets",
    "preset": "presets",
    "summarize": "summary",
    "DiffusersUNet": "adapter",
    "merge_lora": "convert.lora",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    """Import each public name when it is first used, so that `import unet_denoiser` costs next to nothing."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
