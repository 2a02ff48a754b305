"""From a data set to a run directory."""

from unet_denoiser.training.ema import EMA as EMA
from unet_denoiser.training.run import Run as Run
from unet_denoiser.training.trainer import Trainer as Trainer
from unet_denoiser.training.trainer import TrainingStep as TrainingStep
