"""Read and write tensors as safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unet_denoiser.utils.files import write_atomically

_MAX_COPIED_BYTES = 2**20


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; OSError if it cannot be written, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        write_atomically(path, lambda p: save_file(dict(tensors), p, metadata={"format": "pt", **(metadata or {})}))
    except SafetensorError as error:  # it wraps the system's errors
        raise OSError(f"{path} cannot be written: {error}") from None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, large ones mapped from it; ValueError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # Mapped tensors start at any address, torch's own at multiples of 64 bytes, and some kernels round small
        # tensors differently by their alignment: without the copy a loaded network would not equal the saved one.
        return {name: t.clone() if t.nbytes <= _MAX_COPIED_BYTES else t for name, t in load_file(path).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
