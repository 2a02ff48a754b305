"""Read and write safetensors files, guarded by a digest of their contents; tell what a file is by its first bytes."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from unet_denoiser.utils.files import write_atomically

_MAX_COPIED_BYTES, _MAX_HEADER_BYTES = 2**20, 100_000_000
MAX_TENSORS = 50_000  # far above any network, its averages and its optimizer
_CHUNK_BYTES = 2**22
# One changed bit leaves either the key or the value as it is, so that a digest cannot disappear by damage.
_DIGEST_KEY, _DIGEST_PREFIX = "unet_denoiser_digest", "unet-denoiser-sha256:"
_BLANK_DIGEST = _DIGEST_PREFIX + "0" * 64
_DIGEST_FIELD = f'"{_DIGEST_KEY}":"'.encode()
_DIGEST_VALUE = re.compile(_DIGEST_PREFIX.encode() + rb"[0-9a-f]{64}")

_SIGNS = (
    (b"version https://git-lfs", "a pointer of git-lfs; run `git lfs pull` to get the file itself"),
    (b"GGUF", "a GGUF file, whose weights are quantised; give the file that it was made from"),
    (b"\x89HDF", "an HDF5 file of Keras or TensorFlow"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x08", "an ONNX file, or another protocol buffer"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"%PDF", "a PDF document"),
)


class FileKind(NamedTuple):
    """The container of a file: one that can be read, or "other"; and what it is, in words."""

    container: Literal["safetensors", "pickle", "other"]
    words: str


def recognize_file(path: Path) -> FileKind:
    """Tell what a file is by its first bytes, whatever its name."""
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return FileKind("other", "empty; copy or download it again")
    if head[8:9] == b"{" and (header := int.from_bytes(head[:8], "little")) < 2**40:
        if header < path.stat().st_size:
            return FileKind("safetensors", "a safetensors file")
        return FileKind("other", "a safetensors file that is cut off or damaged; copy or download it again")
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and 2 <= int.from_bytes(head[1:2], "little") <= 5):
        return FileKind("pickle", "a file of torch.save")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return FileKind("other", "a web page, as a failed download leaves it; download it again")
    if text.startswith((b"{", b"[")):
        return FileKind("other", "a JSON text")
    if head[257:262] == b"ustar":
        return FileKind("other", "a tar archive, as early versions of torch.save wrote them; save it anew with torch")
    words = next((words for sign, words in _SIGNS if head.startswith(sign)), None)
    if words is None and (head[0] in range(0x81, 0x90) or head[0] in (0xDE, 0xDF)):
        words = "a msgpack file, as Flax writes them; give the weights of PyTorch"
    return FileKind("other", words or "something else than a checkpoint")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, digest: bool = True
) -> None:
    """Write a safetensors file, whole or not at all; OSError if it cannot be written, as on a full disk.

    With `digest`, the metadata get a digest of the whole file, which `read_safetensors` checks.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt", **(metadata or {})} | ({_DIGEST_KEY: _BLANK_DIGEST} if digest else {})

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata=metadata)
        _sort_metadata(temporary)
        if digest and (found := _find_digest(header := _read_header(temporary))) is not None:
            with temporary.open("r+b") as file:
                file.seek(8 + found)
                file.write(_compute_digest(temporary, header, found))

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

    _check_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        kind = recognize_file(path)
        reason = f"it is {kind.words}" if kind.container != "safetensors" else str(error)[:200]
        raise ValueError(f"{path} is not a readable safetensors file: {reason}") from None
    check_digest(path)
    # Mapped tensors start at any address, torch's own at multiples of 64 bytes, and some kernels round small
    # tensors differently by their alignment: without the copy a loaded network would not equal the saved one.
    return {name: t.clone() if t.nbytes <= _MAX_COPIED_BYTES else t for name, t in tensors.items()}


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in a safetensors file's header; ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    _check_header(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {str(error)[:200]}") from None


def check_digest(path: Path) -> None:
    """Raise ValueError if a safetensors file has a digest and its contents are others."""
    header = _read_header(path)
    found = _find_digest(header)
    if found is not None and header[found : found + len(_BLANK_DIGEST)] != _compute_digest(path, header, found):
        raise ValueError(f"{path} is damaged: its contents do not match its digest; copy or download it again")


def _read_header(path: Path) -> bytes:
    """Return the JSON text at the beginning of a file; b"" if it is longer than safetensors takes."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(size) if size <= _MAX_HEADER_BYTES else b""


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that would take minutes to read: a tensor has four of its entries."""
    if (entries := _read_header(path).count(b'":')) > 4 * MAX_TENSORS:
        raise ValueError(f"{path} has a header of {entries:,} entries; the largest networks have some ten thousand")


def _find_digest(header: bytes) -> int | None:
    """Return where the digest begins in a header; None if it has none."""
    if (key := header.find(_DIGEST_FIELD)) >= 0:
        return key + len(_DIGEST_FIELD)
    found = _DIGEST_VALUE.search(header)
    return None if found is None else found.start()


def _compute_digest(path: Path, header: bytes, found: int) -> bytes:
    """Return the digest of a file, in which a blank stands where the digest itself is."""
    blank = header[:found] + _BLANK_DIGEST.encode() + header[found + len(_BLANK_DIGEST) :]

    def hash_chunk(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_CHUNK_BYTES)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing is slower than reading
        parts = pool.map(hash_chunk, range(8 + len(header), path.stat().st_size, _CHUNK_BYTES))
        whole = hashlib.sha256(blank + b"".join(parts))
    return (_DIGEST_PREFIX + whole.hexdigest()).encode()
