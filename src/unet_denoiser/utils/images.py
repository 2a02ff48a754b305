"""Tensors as image files: PNG for 1, 3 and 4 channels, .npy for anything else; grids and GIFs."""

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unet_denoiser.config.paths import local_path
from unet_denoiser.utils.files import write_atomically

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels
LABEL_SIZE, MAX_LABEL = 14, 60  # of the text beside a row: height in pixels, letters


def to_uint8(x: Tensor, data_range: tuple[float, float] | None = None) -> Tensor:
    """Scale floats of any shape from `data_range` (default [-1, 1]) to uint8 in [0, 255], rounded and clamped."""
    low, high = data_range or (-1.0, 1.0)
    return ((x.float() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def save_image(x: Tensor, path: str | Path) -> Path:
    """Save uint8 (C, H, W) with 1, 3 or 4 channels as PNG, and any other (C, *spatial) as .npy; return the path."""
    path = local_path(path)
    array = x.cpu().numpy()
    if x.ndim != 3 or x.shape[0] not in MODES or x.dtype != torch.uint8:
        path = path.with_suffix(".npy")
        write_atomically(path, lambda p: _save_npy(p, array))
        return path
    image = _to_pil(x)
    write_atomically(path, lambda p: image.save(p, format="PNG"))
    return path


def save_grid(
    x: Tensor,
    path: str | Path,
    columns: int | None = None,
    data_range: tuple[float, float] | None = None,
    row_names: Sequence[str] = (),
) -> Path:
    """Save samples as one PNG, row by row, and return its path; the suffix becomes .npy if that was needed.

    Args:
        x: (N, C, H, W) floats in `data_range` (default: [-1, 1]), with 1, 3 or 4 channels; any other shape is saved as
            one .npy instead. Samples smaller than 32 pixels are enlarged by a whole factor, to be visible.
        columns: number of samples in a row (default: the grid is about square).
        row_names: written at the right of the rows, outside of the grid.
    """
    if x.ndim != 4 or x.shape[1] not in MODES:
        return save_image(x, path)
    grid = make_grid(x, columns, data_range)
    return save_image(write_row_names(grid, row_names) if row_names else grid, path)


def make_grid(x: Tensor, columns: int | None = None, data_range: tuple[float, float] | None = None) -> Tensor:
    """Arrange samples (N, C, H, W) in one uint8 image (C, H', W'), row by row, as `save_grid` saves it."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    scale, pad = max(1, math.ceil(32 / min(x.shape[2:]))), 2
    tiles = to_uint8(x, data_range).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = tiles.shape
    rows = math.ceil(n / columns)
    grid = torch.full((c, rows * (h + pad) + pad, columns * (w + pad) + pad), 128, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        grid[:, top : top + h, left : left + w] = tile
    return grid


def write_row_names(grid: Tensor, names: Sequence[str]) -> Tensor:
    """Return a grid (C, H, W) of one row for each name, with the names at its right: (C, H, W + width of the text)."""
    font = ImageFont.load_default(LABEL_SIZE)
    texts = [_printable(name, font) or f"row {row}" for row, name in enumerate(names, start=1)]
    channels, height, width = grid.shape
    image = Image.new(MODES[channels], (width + 12 + math.ceil(max(map(font.getlength, texts))), height), "#808080")
    image.paste(_to_pil(grid), (0, 0))
    draw = ImageDraw.Draw(image)
    for row, text in enumerate(texts):
        draw.text((width + 4, (row + 0.5) * height / len(texts)), text, "white", font, anchor="lm")
    return torch.from_numpy(np.array(image)).view(height, -1, channels).permute(2, 0, 1)


def _printable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return a text with the letters that the font has, without their accents, and "?" for others; "" if it has none.

    Pillow's own font has little but ASCII, and draws a box for all else.
    """
    text = " ".join(unicodedata.normalize("NFKD", text).split())
    box = bytes(font.getmask("\uffff"))
    letters = [a for a in text if not unicodedata.combining(a)]
    shown = ["?" if bytes(font.getmask(a)) == box else a for a in letters]
    if not set(shown) - {"?", " "} and shown != letters:
        return ""
    return "".join(shown[:MAX_LABEL]) + ("..." if len(shown) > MAX_LABEL else "")


def save_gif(frames: Sequence[Tensor], path: str | Path, seconds: float = 3.0) -> Path:
    """Save uint8 images (C, H, W), C 1, 3 or 4, as a GIF of `seconds`, then hold the last frame for a second more.

    ValueError for no frames, or frames of another type or number of channels.
    """
    path = local_path(path)
    if not frames or frames[0].ndim != 3 or frames[0].shape[0] not in MODES or frames[0].dtype != torch.uint8:
        raise ValueError(f"{path}: a GIF shows uint8 images of 1, 3 or 4 channels")
    first, *others = map(_to_pil, frames)
    milliseconds = max(20, round(1000 * seconds / len(frames)))  # viewers slow down faster GIFs
    durations = [milliseconds] * len(others) + [1000]
    options: dict[str, Any] = {"append_images": others, "duration": durations, "loop": 0}
    write_atomically(path, lambda p: first.save(p, format="GIF", save_all=True, **options))
    return path


def _to_pil(pixels: Tensor) -> Image.Image:
    array = pixels.cpu().numpy().transpose(1, 2, 0)  # (H, W, C)
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def _save_npy(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save on a path would add a suffix to the temporary name
        np.save(file, array, allow_pickle=False)
