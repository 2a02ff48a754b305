"""How good samples are: figures of their features beside those of the data."""

from unet_denoiser.metrics import frechet_distance as frechet_distance
from unet_denoiser.metrics import kernel_distance as kernel_distance
from unet_denoiser.metrics import manifold_overlap as manifold_overlap
