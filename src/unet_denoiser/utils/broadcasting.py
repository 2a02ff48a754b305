"""Shapes that broadcast."""

from torch import Tensor


def append_dims(x: Tensor, ndim: int) -> Tensor:
    """Append axes of length 1 to x until it has `ndim`: a value per sample (B,) then multiplies (B, C, *spatial)."""
    return x[(..., *[None] * (ndim - x.ndim))]
