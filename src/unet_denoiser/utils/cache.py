"""A directory of results that are computed once and kept: text tokens, latents, features, scans of image files.

Deleting it costs time only.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np


def cache_directory() -> Path:
    """Return $UNET_DENOISER_CACHE, else unet-denoiser in $XDG_CACHE_HOME or ~/.cache; "~" is the home directory."""
    if given := os.environ.get("UNET_DENOISER_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "unet-denoiser"


def digest(parts: Iterable[str | bytes]) -> str:
    """Hash the parts, in order, to 32 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part  # a path may be any bytes
        # with the length, ("ab", "c") and ("a", "bc") differ
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:32]


def fingerprint(paths: Iterable[str | Path]) -> str:
    """Hash the paths, sizes and modification times of files, and of all files in folders; links are followed."""
    parts = []
    for path in map(Path, paths):
        files = sorted(_list_files(path)) if path.is_dir() else [path]
        parts += [f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return digest(parts)


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder; each real folder once, since links may lead back."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(root)) in seen:
            folders.clear()  # in place: os.walk descends into these
            continue
        seen.add(place)
        yield from (path for name in files if (path := Path(root, name)).is_file())


def compute_once(kind: str, key: str, compute: Callable[[Path], object]) -> Path:
    """Return a directory of the cache that `compute` has filled, in this call or an earlier one.

    If several processes ask at the same time, one computes and the others wait. An interrupted one is repeated.

    Args:
        kind: name of the folder in the cache, for example "latents".
        key: hash of all that the contents depend on, from `digest`.
        compute: called with an empty directory to fill.
    """
    from filelock import FileLock

    directory = cache_directory() / kind / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f"{key}.lock")):
        if not directory.is_dir():
            unfinished = directory.with_name(f"{key}.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                compute(unfinished)
                unfinished.rename(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return directory


class MappedArray:
    """The array of an .npy file, mapped into memory when it is first read.

    It is pickled as its path, so that worker processes map the file instead of copying it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def array(self) -> np.ndarray:
        """Return the array, read-only."""
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}
