"""Arrays that are computed once and kept on disk: text embeddings and latents. Memory-mapped when they are read.

They lie in $UNET_DENOISER_CACHE, or else in unet-denoiser below $XDG_CACHE_HOME or ~/.cache. Deleting it costs
time only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np


def cache_directory() -> Path:
    """The directory that arrays are kept in."""
    if given := os.environ.get("UNET_DENOISER_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unet-denoiser"


def digest(parts: Iterable[str | bytes]) -> str:
    """A name for what the parts say, in order: 32 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]


def fingerprint(paths: Iterable[str | Path]) -> str:
    """A name for the contents of files and of whole folders, by their paths, sizes and times of change."""
    parts = []
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        parts += [f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return digest(parts)


def compute_once(kind: str, key: str, compute: Callable[[Path], object]) -> Path:
    """A directory of the cache that `compute` has filled, now or earlier.

    Of several processes that ask at the same time, one computes and the others wait. What an interrupted one leaves
    behind is never taken for whole.

    Args:
        kind: a word for people who look into the cache.
        key: what the contents depend on, as `digest` makes it.
        compute: fills the directory that it is given.

    Raises:
        OSError: a cache that cannot be written to.
    """
    from filelock import FileLock

    place = cache_directory() / kind / key
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{key}.lock")):
        if not place.is_dir():
            unfinished = place.with_name(f"{key}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                compute(unfinished)
                unfinished.rename(place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return place


class MappedArray:
    """An array in a .npy file, mapped into memory when it is first read; sent to another process as its path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        """The array, read-only."""
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._array

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_array": None}
