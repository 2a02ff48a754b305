"""A dataset in one line of words."""

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamDataset
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.utils.terminal import count_of

SHOWN_NAMES = 5  # of classes, the first ones


def describe_data(config: DataConfig, data: ImageDataset | StreamDataset) -> str:
    """Return size, channels, number, classes, captions and vectors of a dataset, and where these come from.

    `config` is the configuration that `data` was loaded with; a size that it leaves open was chosen by us.
    """
    source = data
    while isinstance(source, DatasetWrapper):
        source = source.data
    count = "a stream of images" if isinstance(data, StreamDataset) else f"{len(data):,} images"
    parts = [f"{count} of {_times(source.image_size)}"]
    if data.buckets if isinstance(data, ImageDataset) else False:
        parts[0] = f"{count} of about {_times(source.image_size)} in several shapes"
    if config.image_size is None and isinstance(source, EncodedImages):
        parts[0] += " (chosen; --image-size changes it)"
    parts[0] += f", {count_of(source.channels, 'channel')}"
    if config.vae is not None:
        parts[0] += f", as latents of {_times(data.image_size)}, {count_of(data.channels, 'channel')}"
    if data.concat_channels:
        parts.append(f"with {count_of(data.concat_channels, 'channel')} of another image ({config.concat})")
    if data.class_names:
        names = data.class_names[:SHOWN_NAMES] + ["..."] * (len(data.class_names) > SHOWN_NAMES)
        label = "class" if len(data.class_names) == 1 else "classes"
        parts.append(f"{len(data.class_names):,} {label} ({', '.join(names)}){_origin(data, 'class_labels')}")
    else:
        parts.append("no classes")
    if data.captions is not None or "caption" in data.origins:
        unused = "" if config.text_encoder else " (not learned without a text_encoder)"
        parts.append(f"captions{_origin(data, 'caption')}{unused}")
    if data.vector_dim:
        parts.append(f"vectors of {count_of(data.vector_dim, 'number')}{_origin(data, 'vector')}")
    return f"{config.source}: {'; '.join(parts)}"


def _origin(data: ImageDataset | StreamDataset, name: str) -> str:
    return f" from {data.origins[name]}" if name in data.origins else ""


def _times(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
