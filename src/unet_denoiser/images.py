"""Tensors in [-1, 1] to files, and back: PNG for 1, 3 and 4 channels, .npy for anything else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unet_denoiser.files import write_atomically

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_uint8(x: Tensor, data_range: tuple[float, float] | None = None) -> Tensor:
    """(…) floats in `data_range` (default [-1, 1]) -> uint8 0 to 255, rounded, clamped."""
    low, high = data_range or (-1.0, 1.0)
    return ((x.float() - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def save_image(x: Tensor, path: str | Path) -> Path:
    """Save one sample (C, *spatial): uint8 (C, H, W) with 1, 3 or 4 channels as PNG, others as .npy; the path used."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = x.cpu().numpy()
    if x.ndim != 3 or x.shape[0] not in MODES or x.dtype != torch.uint8:
        path = path.with_suffix(".npy")
        write_atomically(path, lambda p: _save_npy(p, array))
        return path
    image = Image.fromarray(array.transpose(1, 2, 0).squeeze(2) if x.shape[0] == 1 else array.transpose(1, 2, 0))
    write_atomically(path, lambda p: image.save(p, format="PNG"))
    return path


def save_grid(
    x: Tensor, path: str | Path, columns: int | None = None, data_range: tuple[float, float] | None = None
) -> Path:
    """Save samples (N, C, H, W) as one picture, row by row; samples that are no images go to one .npy instead.

    Samples smaller than 32 pixels are enlarged by a whole factor, so that there is something to see.

    Returns:
        The path used, with the suffix .npy if that was needed.
    """
    if x.ndim != 4 or x.shape[1] not in MODES:
        return save_image(x, path)
    columns = columns or math.ceil(math.sqrt(len(x)))
    scale, pad = max(1, math.ceil(32 / min(x.shape[2:]))), 2
    tiles = to_uint8(x, data_range).cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = tiles.shape
    rows = math.ceil(n / columns)
    grid = torch.full((c, rows * (h + pad) + pad, columns * (w + pad) + pad), 128, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + (i // columns) * (h + pad), pad + (i % columns) * (w + pad)
        grid[:, top : top + h, left : left + w] = tile
    return save_image(grid, path)


def _save_npy(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save on a path would add a suffix to the temporary name
        np.save(file, array, allow_pickle=False)
