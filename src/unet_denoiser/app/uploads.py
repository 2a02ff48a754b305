"""Uploaded images and painted masks, checked before anything is done with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unet_denoiser.app.form import Inputs, check_whole
from unet_denoiser.config.editing import EditingConfig

MAX_PIXELS = 2**24  # of an upload: 4096 x 4096
MAX_RESULT = 2**20  # pixels of an edited image: 1024 x 1024
SHOWN_SIZE = 320  # pixels of the shorter side of an image to paint on, at least


def check_upload(path: str | None) -> Path:
    """Return the path of an uploaded image; ValueError if it is none, or too large, with the name that it had."""
    from unet_denoiser.data.transforms import open_image

    if path is None:
        raise ValueError("no image is uploaded; give one, such as a PNG")
    file, size = Path(path), None
    try:
        with Image.open(file) as image:
            size = image.size
    except Exception:  # decoders raise exceptions of many types, and `open_image` says which
        size = None
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        most = f"at most {MAX_PIXELS:,} pixels, such as 4096 x 4096, are taken"
        raise ValueError(f"{file.name} has {size[0]:,} x {size[1]:,} pixels; {most}")
    open_image(file.read_bytes(), file.name)
    return file


def make_canvas(pipeline: Any, file: Path, *, keep_size: bool) -> Image.Image:
    """Return an uploaded image as the network sees it, enlarged so that it can be painted on.

    Args:
        keep_size: the network is given its own size, as to upscale it.
    """
    from unet_denoiser.utils.images import to_uint8

    pixels = to_uint8(pipeline.read_image(file, keep_size=keep_size))[0]  # (C, H, W)
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).convert("RGB")
    scale = max(1, -(-SHOWN_SIZE // min(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_mask(layers: Sequence[Image.Image], folder: Path) -> Path:
    """Write what is painted as a mask file, white where to paint; ValueError if nothing is."""
    drawn = [layer.convert("RGBA").getchannel("A").point(lambda a: 255 * (a > 0)) for layer in layers]
    if not any(layer.getbbox() for layer in drawn):
        raise ValueError("mask: nothing is painted; paint with the brush over what shall be new")
    mask = drawn[0]
    for layer in drawn[1:]:
        mask.paste(255, mask=layer)
    mask.save(folder / "mask.png")
    return folder / "mask.png"


def make_edit(
    task: str, file: Path, inputs: Inputs, values: dict[str, Any], folder: Path
) -> tuple[EditingConfig, Path | None]:
    """Return the edit that a task asks for, and the image that the network sees beside x_t, if it does.

    Args:
        values: strength, margins (top, right, bottom, left), factor, resample and layers, as the page has them.
        folder: where a mask is written.

    Raises:
        ValueError: a value that cannot be used, by its name.
    """
    if task not in inputs.tasks:
        raise ValueError(f"task={task!r}: this network does not do it; it does {', '.join(inputs.tasks) or 'none'}")
    if task == "translate" or (task == "upscale" and inputs.needs_image):
        _check_result(file, inputs.upscale or 1)
        return EditingConfig(), file
    if task == "upscale":
        factor = check_whole("factor", values["factor"], 2, 16)
        _check_result(file, factor)
        return EditingConfig(image=file, upscale=factor), None
    if task == "vary":
        return EditingConfig(image=file, strength=float(values["strength"])), None
    resample = check_whole("resample", values["resample"], 1, 20)
    if task == "inpaint":
        return EditingConfig(image=file, mask=save_mask(values["layers"], folder), resample=resample), None
    names = ("top", "right", "bottom", "left")
    margins: Any = tuple(check_whole(name, value, 0, 512) for name, value in zip(names, values["margins"], strict=True))
    height, width = inputs.size[0] + margins[0] + margins[2], inputs.size[1] + margins[1] + margins[3]
    if height * width > MAX_RESULT:
        raise ValueError(f"the margins make {height:,} x {width:,} pixels; at most {MAX_RESULT:,} are made")
    return EditingConfig(image=file, outpaint=margins, resample=resample), None


def _check_result(file: Path, factor: int) -> None:
    with Image.open(file) as image:
        height, width = factor * image.height, factor * image.width
    if height * width > MAX_RESULT:
        advice = "give a smaller image or factor"
        raise ValueError(f"the result has {height:,} x {width:,} pixels; at most {MAX_RESULT:,} are made; {advice}")
