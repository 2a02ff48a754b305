"""All options of the project, one dataclass per file. Imports the standard library only, so `--help` is quick."""

from unet_denoiser.config.data import DataConfig as DataConfig
from unet_denoiser.config.diffusion import DiffusionConfig as DiffusionConfig
from unet_denoiser.config.distillation import DistillationConfig as DistillationConfig
from unet_denoiser.config.editing import EditingConfig as EditingConfig
from unet_denoiser.config.export import ExportConfig as ExportConfig
from unet_denoiser.config.memory import MemoryConfig as MemoryConfig
from unet_denoiser.config.presets import list_presets as list_presets
from unet_denoiser.config.presets import preset as preset
from unet_denoiser.config.sampling import SamplingConfig as SamplingConfig
from unet_denoiser.config.training import TrainingConfig as TrainingConfig
from unet_denoiser.config.unet import UNetConfig as UNetConfig
