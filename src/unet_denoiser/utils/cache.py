"""A directory of results that are computed once and kept: text tokens, latents, features, scans of image files.

Deleting it costs time only.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def cache_directory() -> Path:
    """Return $UNET_DENOISER_CACHE, else unet-denoiser in $XDG_CACHE_HOME or ~/.cache; "~" is the home directory.

    Where nothing can be written there, or no home directory is known, it is a temporary directory of this process, with
    one warning.
    """
    if given := os.environ.get("UNET_DENOISER_CACHE"):
        return _usable(os.path.expanduser(given))
    shared = _shared_directory()
    return _usable(shared and os.path.join(shared, "unet-denoiser"))


def provide_caches() -> None:
    """Let other libraries keep their files in our cache where the home directory cannot hold them."""
    if _find_problem(_shared_directory()):
        os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = str(cache_directory())


def _shared_directory() -> str:
    """Return the directory that libraries keep caches in, $XDG_CACHE_HOME or ~/.cache; "" without a home directory."""
    shared = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if not os.path.isabs(shared):  # the standard says to ignore those
        shared = os.path.expanduser("~/.cache") if os.environ.get("HOME", "~") else ""
    return shared if os.path.isabs(shared) else ""


@cache
def _usable(directory: str) -> Path:
    """Return the directory if files can be made in it, else, with a warning, a temporary one."""
    if not (problem := _find_problem(directory)):
        return Path(directory)
    advice = "UNET_DENOISER_CACHE can name a lasting one"
    warnings.warn(f"{problem}; so the cache is a temporary directory ({advice})", stacklevel=3)
    return _temporary_directory()


@cache
def _find_problem(directory: str) -> str:
    """Return why no file can be made in a directory, or ""."""
    if not directory:
        return "no home directory is known"
    try:
        os.makedirs(directory, exist_ok=True)
        with TemporaryFile(dir=directory) as file:
            file.write(b"-")  # a full disk takes names, and no bytes
    except OSError as error:
        return f"nothing can be written to {directory}: {error.strerror}"
    return ""


@cache
def _temporary_directory() -> Path:
    directory = Path(mkdtemp(prefix="unet-denoiser-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


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
    directory = cache_directory() / kind / key
    try:
        return _compute_locked(directory, compute)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or directory.is_relative_to(_temporary_directory()):
            raise
        place = _temporary_directory()
        warnings.warn(f"{directory.parent}: the disk is full; {kind} go to {place}, and are not kept", stacklevel=2)
        return _compute_locked(place / kind / key, compute)


def _compute_locked(directory: Path, compute: Callable[[Path], object]) -> Path:
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        if not directory.is_dir():
            unfinished = directory.with_name(f"{directory.name}.unfinished")
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
        import numpy as np

        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}
