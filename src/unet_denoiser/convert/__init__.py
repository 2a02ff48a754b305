"""Checkpoints of other code, in and out."""

from unet_denoiser.convert.checkpoint import export_checkpoint as export_checkpoint
from unet_denoiser.convert.checkpoint import export_state_dict as export_state_dict
from unet_denoiser.convert.checkpoint import import_checkpoint as import_checkpoint
from unet_denoiser.convert.lora import merge_lora as merge_lora
