"""The reverse process: samplers, guidance, editing, pipeline."""

from unet_denoiser.sampling.arguments import Start as Start
from unet_denoiser.sampling.callbacks import TrajectoryRecorder as TrajectoryRecorder
from unet_denoiser.sampling.editing.image_editing import image_to_image as image_to_image
from unet_denoiser.sampling.editing.image_editing import inpaint as inpaint
from unet_denoiser.sampling.editing.image_editing import outpaint as outpaint
from unet_denoiser.sampling.editing.image_editing import upscale as upscale
from unet_denoiser.sampling.editing.interpolation import interpolate as interpolate
from unet_denoiser.sampling.editing.inversion import invert as invert
from unet_denoiser.sampling.editing.inversion import regenerate as regenerate
from unet_denoiser.sampling.guidance import Guidance as Guidance
from unet_denoiser.sampling.loop import denoise as denoise
from unet_denoiser.sampling.loop import sample as sample
from unet_denoiser.sampling.loop import sample_steps as sample_steps
from unet_denoiser.sampling.samplers import Sampler as Sampler
