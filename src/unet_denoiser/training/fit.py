"""Does a network fit the data that it is to be trained on?"""

from unet_denoiser.config.unet import CONDITIONS, UNetConfig
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import first_item
from unet_denoiser.diffusion.process import Diffusion


def check_fit(config: UNetConfig, process: Diffusion, data: ImageDataset | StreamDataset) -> None:
    """Raise ValueError if the network cannot be trained on the data."""
    process.check_channels(config, data.channels, data.concat_channels)
    if config.dims != len(data.image_size):
        raise ValueError(f"dims={config.dims}, but the data have {len(data.image_size)} axes")
    if config.num_classes is not None and config.num_classes < (classes := len(data.class_names or [])):
        raise ValueError(f"num_classes={config.num_classes}, but the data have {classes} classes; give that, or None")
    item = first_item(data)
    if missing := [name for name in config.conditions if name not in item]:
        option = CONDITIONS[missing[0]]
        raise ValueError(f"{option}={getattr(config, option)}, but the data have no {missing[0]}; give None")
