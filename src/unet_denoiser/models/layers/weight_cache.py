"""Weights that inference prepares for the CPU's convolutions, kept as long as the original ones do not change."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from unet_denoiser.models.layers.kernels import load_kernels

_MAX_BYTES = 2**30  # of all prepared weights


class _Kept(NamedTuple):
    """Prepared weights; the version and the digest of the original ones tell of changes."""

    prepared: Tensor
    version: int
    digest: bytes


_kept: Any = WeakTensorKeyDictionary()  # weight -> _Kept


def can_keep(weight: Tensor, nbytes: int) -> bool:
    """Return True if prepared weights of `nbytes` are kept already or fit, and changes of `weight` can be noticed."""
    if weight.is_inference():
        return False  # an inference tensor has no version
    if weight in _kept:
        return True
    held = [*_kept.data.values()]  # at once: other threads may add weights, or drop them
    return sum(kept.prepared.nbytes for kept in held) + nbytes <= _MAX_BYTES


def keep(weight: Tensor, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """Return prepare(weight), computed anew only if the weight has changed."""
    version, digest, kept = weight._version, digest_of(weight.detach()), _kept.get(weight)
    if kept is None or kept.version != version or kept.digest != digest:
        kept = _kept[weight] = _Kept(prepare(weight.detach()), version, digest)
    return kept.prepared


def digest_of(weight: Tensor) -> bytes:
    """Return a digest of weights (K, C, *kernel) that costs little beside a convolution by them.

    All weights enter it, so it also tells apart what `.data`, a numpy array or another process has changed; the version
    of a tensor does not count those.
    """
    last = weight.is_contiguous(memory_format=torch.channels_last)
    kernels = load_kernels()
    if kernels is not None and (last or weight.is_contiguous()):
        digest = ctypes.create_string_buffer(8)
        kernels.digest(weight.data_ptr(), weight.nbytes, digest)
        return digest.raw
    # the bits of each output channel's weighted sum, which rounds as a convolution does; bits, since NaN is not equal
    # to itself
    rows = (weight.permute(0, 2, 3, 1) if last else weight).flatten(1)  # (K, 9 C)
    return (rows @ _factors(rows.shape[1]).to(rows.dtype)).float().numpy().tobytes()


@cache
def _factors(count: int) -> Tensor:
    """Draw factors in [0.5, 1.5) for the weights of one output channel: (count,)."""
    with torch.inference_mode(False):
        return torch.rand(count, generator=torch.Generator().manual_seed(0)) + 0.5
