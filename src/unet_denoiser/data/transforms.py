"""Image files to tensors: decode, convert to a number of channels, scale, crop, pad and flip."""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps
from torch import Tensor

from unet_denoiser.config.data import DataConfig, ResizeMode
from unet_denoiser.utils.broadcasting import append_dims
from unet_denoiser.utils.images import MODES

Source = str | bytes  # a path, or a file's content
GREY_MODES = {"1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I"}
DECODING = "icc"  # in the keys of what is kept on disk of decoded images; another word whenever pixels change
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("apng", "avif", "bmp", "dib", "gif", "icns", "ico", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pcx"),
        *("pgm", "png", "pnm", "ppm", "psd", "qoi", "sgi", "tga", "tif", "tiff", "webp", "xbm", "xpm"),
    )
)

MAX_PIXELS = 2**29  # of an image, 23,170 x 23,170; a small file may claim any number, and fill the memory
if Image.MAX_IMAGE_PIXELS is not None:  # Pillow refuses images of twice its limit, by default of 179 megapixels
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)


class UnreadableItemError(ValueError):
    """An item cannot be read; training replaces it by another one."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:  # to be raised in a worker process and caught in the main one
        return type(self), (self.name, self.reason)


def open_image(source: Source, name: str = "", *, colours: bool = True) -> Image.Image:
    """Decode an image, rotate it as its EXIF data say, and convert the colours of its ICC profile to sRGB.

    Args:
        colours: convert them (default), or leave them as the file has them, as for a mask.

    Raises:
        UnreadableItemError: it cannot be decoded, or its range is unknown.
    """
    name = name or str(source)
    try:
        with Image.open(source if isinstance(source, str) else BytesIO(source)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            upright = ImageOps.exif_transpose(image)
            upright = _to_srgb(upright) if colours else upright
    except Image.UnidentifiedImageError:
        raise UnreadableItemError(name, "cannot be read as an image: no image format that is known") from None
    except Image.DecompressionBombError:
        reason = f"has more than {MAX_PIXELS // 10**6} megapixels, and is not decoded; make it smaller"
        raise UnreadableItemError(name, reason) from None
    except Exception as error:  # decoders raise exceptions of many types
        reason = str(error) or type(error).__name__
        raise UnreadableItemError(name, f"cannot be read as an image: {reason}") from None
    deep = np.asarray(upright) if upright.mode == "I" else np.zeros(1)
    if upright.mode == "F" or deep.min() < 0 or deep.max() >= 2**16:
        reason = f"has pixels of mode {upright.mode}, of unknown range; put such images into an .npy"
        raise UnreadableItemError(name, reason)
    return upright


def _to_srgb(image: Image.Image) -> Image.Image:
    """Convert an image of 8 bits by its ICC profile; as it is if it has none, or one that cannot be read."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode.startswith("I") or image.mode in ("1", "F"):
        return image
    grey = image.mode in GREY_MODES
    transform = _load_profile(bytes(profile), "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")
    if transform is None:
        return image
    transparent = _has_alpha(image)
    colours = image.convert("L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")
    converted = transform.apply(colours)
    converted = converted.convert("L") if grey else converted
    if transparent:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    converted.info = {}  # no transparent colour, since alpha has it
    return converted


@lru_cache(32)
def _load_profile(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of an ICC profile to sRGB; None if it is sRGB already, or cannot be used on the mode."""
    try:
        found = ImageCms.ImageCmsProfile(BytesIO(profile))
        if found.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(found, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = Image.frombytes(mode, (64, 64), np.random.default_rng(0).bytes(64 * 64 * len(mode)))
        changed = np.asarray(transform.apply(probe), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError) as error:
        # once for each profile, and not again in every worker process
        if torch.utils.data.get_worker_info() is None:
            unusable = f"an ICC profile of {len(profile)} bytes cannot be used: {error}"
            warnings.warn(f"{unusable}; images with it are read as sRGB", stacklevel=2)
        return None
    same = mode != "CMYK" and np.abs(changed - np.asarray(probe.convert("RGB"), np.int16)).max() <= 1
    return None if same else transform


def read_pixels(source: Source, name: str, channels: int, size: Sequence[int], config: DataConfig) -> Tensor:
    """Decode an image and scale it as `config` says: (channels, h, w), as `to_pixels` returns it."""
    return to_pixels(open_image(source, name), channels, size, config.resize_mode, config.background)


def to_pixels(
    image: Image.Image, channels: int, size: Sequence[int], mode: ResizeMode, background: str = "white"
) -> Tensor:
    """Return an image as (channels, h, w) uint8, scaled for `mode` but not yet cropped or padded to `size`.

    16-bit grey images become float32 in [-1, 1], to keep their precision. Transparent images are laid on `background`,
    but with 4 channels keep their alpha; opaque ones then get an opaque alpha.
    """
    deep = image.mode.startswith("I")  # 16-bit grey
    converted = Image.fromarray(np.asarray(image, np.float32)) if deep else _to_mode(image, MODES[channels], background)
    height, width = compute_scaled_size((image.height, image.width), size, mode)
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(converted)).view(height, width, -1).permute(2, 0, 1)  # (channels, h, w)
    if not deep:
        return pixels.contiguous()
    grey = (pixels / 32767.5 - 1).clamp(-1, 1)
    return torch.cat([grey.expand(min(channels, 3), -1, -1), torch.ones_like(grey)[: channels // 4]])


def _to_mode(image: Image.Image, mode: str, background: str) -> Image.Image:
    transparent = _has_alpha(image)
    if transparent:
        image = image.convert("RGBA")
    if transparent and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert(mode)


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info


def compute_scaled_size(old_size: Sequence[int], size: Sequence[int], mode: ResizeMode) -> tuple[int, ...]:
    """Return the size before cropping or padding: for "pad" the image fits into `size`, for a crop it covers it."""
    if mode == "stretch":
        return tuple(size)
    ratios = [new / old for new, old in zip(size, old_size, strict=True)]
    ratio = min(ratios) if mode == "pad" else max(ratios)
    scaled = [max(1, round(old * ratio)) for old in old_size]
    # the axis that decides must come out exactly, whatever the rounding
    return tuple(min(n, s) if mode == "pad" else max(n, s) for n, s in zip(size, scaled, strict=True))


def to_float(pixels: Tensor) -> Tensor:
    """Scale uint8 or uint16 from its whole range to float32 in [-1, 1]; other tensors only become float32."""
    largest = {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype)
    return pixels.float() if largest is None else pixels.float() / (largest / 2) - 1


def augment(
    image: Tensor,
    size: tuple[int, ...],
    config: DataConfig | None,
    *,
    rng: np.random.Generator | None = None,
    background: Tensor | None = None,
) -> Tensor:
    """Crop or pad a scaled image (C, *spatial) in [-1, 1] to (C, *size), and flip it.

    Args:
        config: `resize_mode` and `horizontal_flip`; None crops the centre.
        rng: for random crops and flips (default: crop the centre, do not flip).
        background: (C,) in [-1, 1], to pad with (default: 1, white).
    """
    offsets = [0.5] * len(size)
    if rng is not None and config is not None and config.resize_mode == "random_crop":
        offsets = rng.random(len(size)).tolist()
    image = _crop_or_pad(image, size, offsets, background)
    if rng is not None and config is not None and config.horizontal_flip and rng.random() < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def _crop_or_pad(image: Tensor, size: tuple[int, ...], offsets: Sequence[float], background: Tensor | None) -> Tensor:
    for axis, (length, offset) in enumerate(zip(size, offsets, strict=True), start=1):
        if (excess := image.shape[axis] - length) > 0:
            image = image.narrow(axis, min(excess, int(offset * (excess + 1))), length)
    if tuple(image.shape[1:]) == size:
        return image
    fill = image.new_ones(len(image)) if background is None else background
    padded = append_dims(fill, image.ndim).expand(-1, *size).clone()
    starts = [(n - m) // 2 for n, m in zip(size, image.shape[1:], strict=True)]
    padded[:, *[slice(i, i + n) for i, n in zip(starts, image.shape[1:], strict=True)]] = image
    return padded


def parse_colour(background: str) -> tuple[int, int, int]:
    """Return (r, g, b) in [0, 255] of a colour's name or "#rrggbb" code; ValueError if it is neither."""
    try:
        return ImageColor.getcolor(background, "RGB")  # type: ignore[return-value]
    except ValueError:
        raise ValueError(f"background={background!r} is no colour; give a name or '#rrggbb'") from None


def make_fill(background: str, channels: int) -> Tensor:
    """Return the colour to pad with, (channels,) in [-1, 1]; -1 unless there are 1, 3 or 4 channels."""
    if channels not in MODES:
        return torch.full((channels,), -1.0)
    pixel = np.array(Image.new("RGB", (1, 1), parse_colour(background)).convert(MODES[channels])).reshape(-1)
    return torch.from_numpy(pixel.astype(np.float32)) / 127.5 - 1
