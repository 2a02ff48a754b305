"""The forward process and the training loss."""

from unet_denoiser.diffusion.loss import Losses as Losses
from unet_denoiser.diffusion.loss import training_losses as training_losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting as LossWeighting
from unet_denoiser.diffusion.process import Diffusion as Diffusion
