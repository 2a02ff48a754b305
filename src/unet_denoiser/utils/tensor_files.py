"""Read and write tensors as safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from unet_denoiser.utils.files import write_atomically

_MAX_COPIED_BYTES = 2**20


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; OSError if it cannot be written, as on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata={"format": "pt", **(metadata or {})})
        _sort_metadata(temporary)

    try:
        write_atomically(path, write)
    except SafetensorError as error:  # it wraps the system's errors
        raise OSError(f"{path} cannot be written: {error}") from None


def _sort_metadata(path: Path) -> None:
    """Sort the keys of the metadata in place: the library writes them in a random order, and equal files are equal."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


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
