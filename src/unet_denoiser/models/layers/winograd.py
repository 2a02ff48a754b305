"""Convolution by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications, in plain torch, for CPUs.

Lavin and Gray 2016, arXiv 1509.09308, section 4.3. An image is cut into tiles of 6x6 that overlap by two. With fixed
matrices A, B and G, an input tile d and the weights g give an output tile of 4x4 (their equation 8):

    Y = A^T [(G g G^T) * (B^T d B)] A

where * multiplies the 36 positions one by one; over all channels and tiles, that is 36 matrix products. The transforms
are matrix products too, first of the rows, then of the columns. The tiles are computed in blocks that stay in the
cache from input to output: without blocks, memory traffic takes the time that the arithmetic saves.

All images in this file have their channels last: (N, H, W, C).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# for the points 0, 1, -1, 2, -2 and infinity
_A = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))
_BT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_G = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)  # fmt: skip
_BIAS_POSITION = 7  # position (1, 1) adds the same to all values of an output tile
_MAX_BLOCK_TILES = 128  # more tiles leave the cache, fewer read the weights too often


class _Block(NamedTuple):
    """Tiles of `images` images from `image` on: of each, `rows` rows from `row` on, of `columns` tiles.

    `rows` is all rows of an image if images > 1.
    """

    image: int
    images: int
    row: int
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.images * self.rows * self.columns


class _Buffers:
    """Named memory that is used again, for the blocks of one call or from call to call."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        found = self.named.get(name)
        if found is None or found.numel() < size or found.dtype != like.dtype:
            with torch.inference_mode(False):  # training could not write to an inference tensor
                self.named[name] = found = torch.empty(size, dtype=like.dtype)
        return found[:size].view(shape)


class _Scratch(threading.local):
    """Memory for transformed weights, which are four times as large as a layer's weights.

    Reused, since the system hands out more than 32 MiB page by page, which takes three times as long as the transform.
    """

    def __init__(self) -> None:
        self.buffer = _Buffers()


_scratch, _first_block_only = _Scratch(), False


@contextmanager
def first_block_only() -> Iterator[None]:
    """Within it, compute the first block of tiles alone, in scratch memory that is dropped afterwards.

    That is enough to count memory on tensors without storage: the first block is the largest, and all use the same.
    """
    global _scratch, _first_block_only
    before = _scratch, _first_block_only
    _scratch, _first_block_only = _Scratch(), True
    try:
        yield
    finally:
        _scratch, _first_block_only = before


def transform_weight(weight: Tensor, *, rotated: bool = False, scratch: bool = False) -> Tensor:
    """Compute G g G^T of all channels: (K, C, 3, 3) -> (36, C, K).

    Args:
        rotated: rotate the kernels by 180 degrees and return (36, K, C), for the gradient of the input.
        scratch: write into this thread's scratch memory, which its next call overwrites.
    """
    out_ch, in_ch = weight.shape[:2]
    g = _matrix(_G, weight)
    g = torch.kron(g, g)  # (36, 9)
    out = _scratch.buffer("weights", weight, 36, out_ch * in_ch) if scratch else None
    # rotated by 180 degrees, the nine weights are in reverse order
    u = torch.mm(g.flip(1) if rotated else g, weight.detach().reshape(-1, 9).t(), out=out).view(36, out_ch, in_ch)
    return u if rotated else u.transpose(1, 2)


def convolve(x: Tensor, transformed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (N, H, W, C), padded by one, with transformed weights (36, C, K): (N, H, W, K)."""
    images, height, width, in_ch = x.shape
    rows, columns, out_ch = -(-height // 4), -(-width // 4), transformed.shape[2]
    out = x.new_empty(images, 4 * rows, 4 * columns, out_ch)
    at, bt, buffers = _matrix(_A, x).t(), _matrix(_BT, x), _Buffers()
    for block in _blocks(images, rows, columns):
        i, m, a, r, _ = block
        v = _transform_input(x, block, bt, buffers).view(36, block.tiles, in_ch)
        products = torch.bmm(v, transformed, out=buffers("products", x, 36, block.tiles, out_ch))
        if bias is not None:
            products[_BIAS_POSITION].add_(bias)
        # A^T [...] A: first along the rows, (6, 6, ...) -> (6, 4, ...); then, regrouped into bands of 6 lines, along
        # the columns, (m r, 6, ...) -> (m r, 4, ...), into the output
        y = _multiply(at, products.view(6, 6, -1), buffers("y", x, 6, 4, block.tiles * out_ch))
        bands = buffers("bands", x, m, r, 6, columns, 4, out_ch)
        bands.copy_(y.view(6, 4, m, r, columns, out_ch).permute(2, 3, 0, 4, 1, 5))
        _multiply(at, bands.view(m * r, 6, -1), out[i : i + m, 4 * a : 4 * (a + r)].view(m * r, 4, -1))
    return out[:, :height, :width].contiguous()


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Compute the gradient of the weights (K, C, 3, 3) from the input (N, H, W, C) and the output's gradient dY.

    It is the adjoint of equation 8, G^T [(A dY A^T) * (B^T d B)] G, summed over the tiles; dY is (N, H, W, K).
    """
    images, height, width, in_ch = x.shape
    rows, columns, out_ch = -(-height // 4), -(-width // 4), grad.shape[3]
    grad = F.pad(grad, (0, 0, 0, -width % 4, 0, -height % 4)).contiguous()
    total = _scratch.buffer("weights", x, 36, out_ch, in_ch)
    a_, bt, buffers = _matrix(_A, x), _matrix(_BT, x), _Buffers()
    for block in _blocks(images, rows, columns):
        i, m, a, r, _ = block
        v = _transform_input(x, block, bt, buffers).view(36, block.tiles, in_ch)
        bands = grad[i : i + m, 4 * a : 4 * (a + r)].view(m, r, 4, 4 * columns * out_ch)
        z = _transform_tiles(a_, bands, block, buffers, "z").view(36, block.tiles, out_ch)
        total.baddbmm_(z.transpose(1, 2), v, beta=0 if i == a == 0 else 1)
    g = _matrix(_G, x)
    # (9, K C), then transposed: as (K C, 36) @ (36, 9), the library takes ten times as long
    return (torch.kron(g, g).t() @ total.view(36, -1)).t().contiguous().view(out_ch, in_ch, 3, 3)


def _blocks(images: int, rows: int, columns: int) -> Iterator[_Block]:
    """Cut images into blocks: several images at a time, or rows of one image."""
    r = min(rows, max(1, _MAX_BLOCK_TILES // columns))
    m = max(1, _MAX_BLOCK_TILES // (rows * columns)) if r == rows else 1
    for i in range(0, images, m):
        for a in range(0, rows, r):
            yield _Block(i, min(m, images - i), a, min(r, rows - a), columns)
            if _first_block_only:
                return


def _transform_input(x: Tensor, block: _Block, bt: Tensor, buffers: _Buffers) -> Tensor:
    """Compute B^T d B of a block's tiles: (6, 6, tiles * C)."""
    _, height, width, channels = x.shape
    i, m, a, r, columns = block
    # the block's images lie below each other, with four lines to spare: so all bands of tiles are four lines apart
    line = (4 * columns + 2) * channels
    padded = buffers("padded", x, (m * (r + 1) * 4 + 2) * line)
    rows = padded[: m * (r + 1) * 4 * line].view(m, 4 * r + 4, 4 * columns + 2, channels)
    top = 4 * a - 1  # the image's line that is the block's first one
    first, last = max(top, 0), min(top + 4 * r + 2, height)
    rows[:, : first - top].zero_()
    rows[:, last - top :].zero_()
    rows[:, :, 0].zero_()
    rows[:, :, width + 1 :].zero_()
    rows[:, first - top : last - top, 1 : width + 1] = x[i : i + m, first:last]
    bands = padded.as_strided((m, r + 1, 6, line), (4 * (r + 1) * line, 4 * line, line, 1))
    return _transform_tiles(bt, bands, block, buffers, "v")


def _transform_tiles(matrix: Tensor, bands: Tensor, block: _Block, buffers: _Buffers, name: str) -> Tensor:
    """Compute M d M^T of all tiles d (s, s) of a block, for a matrix M (6, s): (6, 6, tiles * C).

    Args:
        bands: (images, rows or more, s, W * C), the lines of each row of tiles; further rows are left out.
    """
    _, m, _, r, columns = block
    s = matrix.shape[1]
    width = 4 * columns + s - 4
    bands = bands.flatten(0, 1)
    lines = _multiply(matrix, bands, buffers(f"{name} lines", bands, len(bands), 6, bands.shape[2]))
    lines = lines.view(m, len(bands) // m, 6, width, -1)[:, :r]
    # cut into tiles, (images, rows, 6, columns, C, s) -> (6, s, images, rows, columns, C)
    tiles = buffers(f"{name} tiles", bands, 6, s, m, r, columns, lines.shape[-1])
    tiles.copy_(lines.unfold(3, s, 4).permute(2, 5, 0, 1, 3, 4))
    return _multiply(matrix, tiles.view(6, s, -1), buffers(name, bands, 6, 6, block.tiles * lines.shape[-1]))


def _matrix(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype)


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    """Multiply each item of a batch by a matrix; bmm uses all cores, which one product of so few rows would not."""
    return torch.bmm(matrix.expand(len(batch), *matrix.shape), batch, out=out)
