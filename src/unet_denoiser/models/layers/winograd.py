"""Convolution by Winograd's minimal filtering F(4x4, 3x3): a quarter of the multiplications, in plain torch, for CPUs.

Lavin and Gray 2015, arXiv 1509.09308. An image is cut into tiles of 6x6 that overlap by two. With fixed matrices A, B
and G, a tile d and the weights w give a tile of 4x4 of the output,

    y = A^T [(G w G^T) * (B^T d B)] A

where * multiplies the 36 places one by one: over all channels and tiles, that is 36 products of matrices. The
transforms are products too, first of the rows, then of the columns. Only some tiles are worked on at a time, so that
they stay in the cache from gathering to output: without these blocks, memory takes what arithmetic saves.

Images are channels last in here: (N, H, W, C).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# of the points 0, 1, -1, 2, -2 and infinity
_A = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))
_BT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0), (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_G = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)  # fmt: skip
_CONSTANT = 7  # the place (1, 1), which adds the same to all of a tile's output: where a bias goes
_TILES = 128  # at once: more leave the cache, fewer read the weights too often


class _Block(NamedTuple):
    """Images [i, i + m), rows of tiles [a, a + r), of `columns` tiles each; r is all of the rows where m > 1."""

    i: int
    m: int
    a: int
    r: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.m * self.r * self.columns


class _Buffers:
    """Memory that is used again, by name: for the blocks of one call, or from call to call."""

    def __init__(self) -> None:
        self.named: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        found = self.named.get(name)
        if found is None or found.numel() < size or found.dtype != like.dtype:
            with torch.inference_mode(False):  # whose tensors could not be written to in training
                self.named[name] = found = torch.empty(size, dtype=like.dtype)
        return found[:size].view(shape)


class _Scratch(threading.local):
    """What has four times the size of a layer's weights. Fresh from the system, which hands out memory of more than
    32 MiB page by page, it would cost three times as much as what is computed into it."""

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


def transform_weight(weight: Tensor, *, turned: bool = False, keep: bool = True) -> Tensor:
    """G w G^T of all channels: (K, C, 3, 3) -> (36, C, K); `turned`, for the gradient of the input, (36, K, C).

    Args:
        keep: the result may be kept; without it, this thread's next call writes over it.
    """
    out_ch, in_ch = weight.shape[:2]
    g = _matrix(_G, weight)
    g = torch.kron(g, g)
    out = None if keep else _scratch.buffer("weights", weight, 36, out_ch * in_ch)
    # turned by 180 degrees, the nine weights are in reverse order
    u = torch.mm(g.flip(1) if turned else g, weight.detach().reshape(-1, 9).t(), out=out).view(36, out_ch, in_ch)
    return u if turned else u.transpose(1, 2)


def convolve(x: Tensor, transformed: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution of x (N, H, W, C), padded by one, with transformed weights (36, C, K): (N, H, W, K)."""
    images, height, width, in_ch = x.shape
    rows, columns, out_ch = -(-height // 4), -(-width // 4), transformed.shape[2]
    out = x.new_empty(images, 4 * rows, 4 * columns, out_ch)
    at, bt, buffers = _matrix(_A, x).t(), _matrix(_BT, x), _Buffers()
    for block in _blocks(images, rows, columns):
        i, m, a, r, _ = block
        v = _input_places(x, block, bt, buffers).view(36, block.tiles, in_ch)
        places = torch.bmm(v, transformed, out=buffers("product", x, 36, block.tiles, out_ch))
        if bias is not None:
            places[_CONSTANT].add_(bias)
        # the columns of each place's row, those side by side, then the rows, straight into the output
        y = _times(at, places.view(6, 6, -1), buffers("y", x, 6, 4, block.tiles * out_ch))
        bands = buffers("bands", x, m, r, 6, columns, 4, out_ch)
        bands.copy_(y.view(6, 4, m, r, columns, out_ch).permute(2, 3, 0, 4, 1, 5))
        _times(at, bands.view(m * r, 6, -1), out[i : i + m, 4 * a : 4 * (a + r)].view(m * r, 4, -1))
    return out[:, :height, :width].contiguous()


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weights, (K, C, 3, 3), from the input (N, H, W, C) and the output's gradient (N, H, W, K).

    It is the transpose of the formula above, G^T [(A dy A^T) * (B^T d B)] G, summed over the tiles.
    """
    images, height, width, in_ch = x.shape
    rows, columns, out_ch = -(-height // 4), -(-width // 4), grad.shape[3]
    grad = F.pad(grad, (0, 0, 0, -width % 4, 0, -height % 4)).contiguous()
    total = _scratch.buffer("weights", x, 36, out_ch, in_ch)
    a_, bt, buffers = _matrix(_A, x), _matrix(_BT, x), _Buffers()
    for block in _blocks(images, rows, columns):
        i, m, a, r, _ = block
        v = _input_places(x, block, bt, buffers).view(36, block.tiles, in_ch)
        bands = grad[i : i + m, 4 * a : 4 * (a + r)].view(m * r, 4, -1)
        z = _places(a_, bands, block, (m, r, 6, 4 * columns, out_ch), buffers, "z").view(36, block.tiles, out_ch)
        total.baddbmm_(z.transpose(1, 2), v, beta=0 if i == a == 0 else 1)
    g = _matrix(_G, x)
    # (9, KC), then turned: as (KC, 36) @ (36, 9), the library takes ten times as long
    return (torch.kron(g, g).t() @ total.view(36, -1)).t().contiguous().view(out_ch, in_ch, 3, 3)


def _blocks(images: int, rows: int, columns: int) -> Iterator[_Block]:
    """Several images at a time, or a band of one."""
    r = min(rows, max(1, _TILES // columns))
    m = max(1, _TILES // (rows * columns)) if r == rows else 1
    for i in range(0, images, m):
        for a in range(0, rows, r):
            yield _Block(i, min(m, images - i), a, min(r, rows - a), columns)
            if _first_block_only:
                return


def _input_places(x: Tensor, block: _Block, bt: Tensor, buffers: _Buffers) -> Tensor:
    """B^T d B of a block's tiles: (6, 6, tiles * C)."""
    _, height, width, channels = x.shape
    i, m, a, r, columns = block
    # the images of a block are below each other, four rows more than they have: so all bands are four rows apart
    padded = buffers("padded", x, (m * (r + 1) * 4 + 2) * (4 * columns + 2) * channels)
    line = (4 * columns + 2) * channels
    rows = padded[: m * (r + 1) * 4 * line].view(m, 4 * r + 4, 4 * columns + 2, channels)
    top = 4 * a - 1  # the image's row that is a block's first
    first, last = max(top, 0), min(top + 4 * r + 2, height)
    rows[:, : first - top].zero_()
    rows[:, last - top :].zero_()
    rows[:, :, 0].zero_()
    rows[:, :, width + 1 :].zero_()
    rows[:, first - top : last - top, 1 : width + 1] = x[i : i + m, first:last]
    bands = padded.as_strided((m * (r + 1), 6, line), (4 * line, line, 1))
    return _places(bt, bands, block, (m, r + 1, 6, 4 * columns + 2, channels), buffers, "v")


def _places(matrix: Tensor, bands: Tensor, block: _Block, shape: Sequence[int], buffers: _Buffers, name: str) -> Tensor:
    """matrix d matrix^T of all tiles d, (s, s): bands (B, s, W * C) -> (6, 6, tiles * C).

    shape: (m, bands per image, 6, W, C) of the bands after the first product; what is beyond the block is left out.
    """
    _, m, _, r, columns = block
    s = matrix.shape[1]
    lines = _times(matrix, bands, buffers(f"{name} lines", bands, len(bands), 6, bands.shape[2]))
    tiles = buffers(f"{name} tiles", bands, 6, s, m, r, columns, shape[-1])
    tiles.copy_(lines.view(shape)[:, :r].unfold(3, s, 4).permute(2, 5, 0, 1, 3, 4))
    return _times(matrix, tiles.view(6, s, -1), buffers(name, bands, 6, 6, block.tiles * shape[-1]))


def _matrix(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=like.dtype)


def _times(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    """matrix @ each of the batch; bmm splits it among the cores, which one large product of so few rows is not."""
    return torch.bmm(matrix.expand(len(batch), *matrix.shape), batch, out=out)
