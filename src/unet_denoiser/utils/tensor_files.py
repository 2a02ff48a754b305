"""Tensors in safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unet_denoiser.utils.files import write_atomically


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; a full disk and the like raise OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_atomically(path, lambda p: save_file(dict(tensors), p, metadata={"format": "pt", **(metadata or {})}))
    except SafetensorError as error:  # it wraps the system's errors
        raise OSError(f"{path} cannot be written: {error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, the large ones mapped from it; a damaged file raises ValueError naming it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # mapped tensors start anywhere, torch's own at multiples of 64 bytes; for small ones some kernels then round
        # the last bit differently, and a loaded network would not equal the saved one
        return {name: t.clone() if t.nbytes <= 2**20 else t for name, t in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
