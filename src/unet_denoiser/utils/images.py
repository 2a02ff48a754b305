"""Tensors as image files: PNG for 1, 3 and 4 channels, .npy for anything else; grids and GIFs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_denoiser.config.paths import local_path
from unet_denoiser.utils.files import write_atomically

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels


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
    x: Tensor, path: str | Path, columns: int | None = None, data_range: tuple[float, float] | None = None
) -> Path:
    """Save samples as one PNG, row by row, and return its path; the suffix becomes .npy if that was needed.

    Args:
        x: (N, C, H, W) floats in `data_range` (default: [-1, 1]), with 1, 3 or 4 channels; any other shape is saved as
            one .npy instead. Samples smaller than 32 pixels are enlarged by a whole factor, to be visible.
        columns: number of samples in a row (default: the grid is about square).
    """
    is_image = x.ndim == 4 and x.shape[1] in MODES
    return save_image(make_grid(x, columns, data_range) if is_image else x, path)


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
