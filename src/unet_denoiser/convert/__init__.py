"""Checkpoints of other code, in and out."""

from unet_denoiser.convert.checkpoint import read as read
from unet_denoiser.convert.checkpoint import save as save
from unet_denoiser.convert.checkpoint import write as write
from unet_denoiser.convert.lora import merge_lora as merge_lora
