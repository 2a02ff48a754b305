"""Image files and bytes to tensors of a given number of channels, whatever mode they have."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from unet_denoiser.config.data import DataConfig, ResizeMode
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.images import MODES

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


class UnreadableItemError(ValueError):
    """An item that cannot be read, and the reason; training takes another one instead."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)


def augment(
    image: Tensor,
    size: tuple[int, ...],
    config: DataConfig | None,
    rng: np.random.Generator | None,
    background: Tensor | None = None,
) -> Tensor:
    """Crop or pad a scaled image (C, *spatial) to `size`, and flip it; without `rng` nothing is random."""
    offsets = [0.5] * len(size)
    if rng is not None and config is not None and config.resize_mode == "random_crop":
        offsets = rng.random(len(size)).tolist()
    if tuple(image.shape[1:]) != size:
        image = _frame(image, size, offsets, background)
    if rng is not None and config is not None and config.horizontal_flip and rng.random() < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def _frame(image: Tensor, size: tuple[int, ...], offsets: Sequence[float], background: Tensor | None) -> Tensor:
    for axis, (wanted, offset) in enumerate(zip(size, offsets, strict=True), start=1):
        if (spare := image.shape[axis] - wanted) > 0:
            image = image.narrow(axis, min(spare, int(offset * (spare + 1))), wanted)
    if tuple(image.shape[1:]) == size:
        return image
    fill = image.new_ones(len(image)) if background is None else background
    framed = append_dims(fill, image.ndim).expand(-1, *size).clone()
    starts = [(n - m) // 2 for n, m in zip(size, image.shape[1:], strict=True)]
    framed[:, *[slice(i, i + n) for i, n in zip(starts, image.shape[1:], strict=True)]] = image
    return framed


def scaled_size(found: Sequence[int], size: Sequence[int], mode: ResizeMode) -> tuple[int, ...]:
    """The size an image is scaled to before it is cropped (to cover `size`) or padded (to fit into it)."""
    if mode == "stretch":
        return tuple(size)
    ratios = [n / m for n, m in zip(size, found, strict=True)]
    ratio = min(ratios) if mode == "pad" else max(ratios)
    scaled = [max(1, round(m * ratio)) for m in found]
    # the axis that decides comes out exactly, whatever the rounding
    return tuple(min(n, s) if mode == "pad" else max(n, s) for n, s in zip(size, scaled, strict=True))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 or uint16 over its whole range -> float32 in [-1, 1]; floats stay as they are."""
    largest = {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype)
    return pixels.float() if largest is None else pixels.float() / (largest / 2) - 1
