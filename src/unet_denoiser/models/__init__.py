"""Networks: the U-Net, its layers, the frozen text encoder and VAE."""

from unet_denoiser.models.layers.attention import CrossAttention as CrossAttention
from unet_denoiser.models.layers.attention import SelfAttention as SelfAttention
from unet_denoiser.models.layers.embeddings import SinusoidalPosEmb as SinusoidalPosEmb
from unet_denoiser.models.layers.resblock import ResBlock as ResBlock
from unet_denoiser.models.unet import UNet as UNet
