"""Names and files in, images out."""

from unet_denoiser.sampling.pipeline.exporting import export_pipeline as export_pipeline
from unet_denoiser.sampling.pipeline.generation import GenerationRequest as GenerationRequest
from unet_denoiser.sampling.pipeline.generation import generate as generate
from unet_denoiser.sampling.pipeline.pipeline import Pipeline as Pipeline
