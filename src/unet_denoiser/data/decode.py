"""Image files and bytes to tensors of a given number of channels, whatever mode they have."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from unet_denoiser.data.base import UnreadableItemError, scaled_size
from unet_denoiser.images import MODES
from unet_denoiser.recipe_data import ResizeMode

Source = str | bytes  # a path, or a file's content
GREY = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I"}
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "dib", "gif", "icns", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pcx"),
        *("pgm", "png", "pnm", "ppm", "psd", "qoi", "sgi", "tga", "tif", "tiff", "webp", "xbm", "xpm"),
    )
)


def open_image(source: Source, name: str = "") -> Image.Image:
    """The decoded image, turned as its EXIF data say; whatever a decoder raises becomes one `UnreadableItemError`."""
    name = name or str(source)
    try:
        with Image.open(source if isinstance(source, str) else BytesIO(source)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image)
    except Exception as error:  # the formats' decoders raise what they like
        raise UnreadableItemError(name, f"cannot be read as an image: {_reason(error)}") from None
    if turned.mode == "F" or (turned.mode == "I" and not _is_16_bit(turned)):
        reason = f"has pixels of mode {turned.mode}, of unknown range; put such images into an .npy"
        raise UnreadableItemError(name, reason)
    return turned


def _is_16_bit(image: Image.Image) -> bool:
    array = np.asarray(image)
    return bool(array.min() >= 0 and array.max() < 2**16)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format that is known"
    return str(error) or type(error).__name__


def to_pixels(
    image: Image.Image, channels: int, size: Sequence[int], mode: ResizeMode, background: str = "white"
) -> Tensor:
    """Scale for `mode` and convert: (channels, h, w) uint8, or floats in [-1, 1] for 16-bit grey, which keep them.

    Alpha is laid on `background` unless there are 4 channels; other images are opaque then.
    """
    deep = image.mode.startswith("I")
    converted = Image.fromarray(np.asarray(image, np.float32)) if deep else _to_mode(image, MODES[channels], background)
    height, width = scaled_size((image.height, image.width), size, mode)
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BICUBIC)
    array = torch.from_numpy(np.array(converted)).view(height, width, -1).permute(2, 0, 1)
    if not deep:
        return array.contiguous()
    grey = (array / 32767.5 - 1).clamp(-1, 1)
    return torch.cat([grey.expand(min(channels, 3), -1, -1), torch.ones_like(grey)[: channels // 4]])


def _to_mode(image: Image.Image, mode: str, background: str) -> Image.Image:
    transparent = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")
    if transparent and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert(mode)


def check_colour(background: str) -> tuple[int, int, int]:
    """(r, g, b) of a colour's name or code; ValueError for one that is none."""
    try:
        return ImageColor.getcolor(background, "RGB")  # type: ignore[return-value]
    except ValueError:
        raise ValueError(f"background={background!r} is no colour; give a name or '#rrggbb'") from None


def fill_colour(background: str, channels: int) -> Tensor:
    """(channels,) in [-1, 1]: the colour that `pad` fills with; for other numbers of channels the lowest value."""
    if channels not in MODES:
        return torch.full((channels,), -1.0)
    pixel = np.array(Image.new("RGB", (1, 1), check_colour(background)).convert(MODES[channels])).reshape(-1)
    return torch.from_numpy(pixel.astype(np.float32)) / 127.5 - 1
