"""Images in, batches out."""

from unet_denoiser.data.dataloader import make_loader as make_loader
from unet_denoiser.data.dataset import ImageDataset as ImageDataset
from unet_denoiser.data.load import load_data as load_data
from unet_denoiser.data.sources.arrays import ArrayDataset as ArrayDataset
from unet_denoiser.data.sources.image_folder import ImageFolder as ImageFolder
