"""Decode every image once before training, so that a bad one is found at the start and not at step 40,000."""

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

import PIL

from unet_denoiser.data.transforms import GREY_MODES, Source, UnreadableItemError, open_image
from unet_denoiser.utils.cache import cache_directory
from unet_denoiser.utils.files import read_json, write_json

MISSING = "is missing"  # the problem of a file that does not exist
MAX_NAMED_IMAGES = 5  # in a message about bad ones
MIN_IMAGES_FOR_PROGRESS_BAR = 1000


class Header(NamedTuple):
    """The result of decoding an image: its kind, its size once upright, or the problem with it."""

    is_grey: bool
    height: int
    width: int
    problem: str | None = None

    @classmethod
    def read(cls, source: Source, name: str) -> Self:
        """Decode an image; UnreadableItemError if that fails."""
        image = open_image(source, name)
        return cls(image.mode in GREY_MODES, image.height, image.width)


def verify_images(name: str, stamps: dict[str, list[int]], open_source: Callable[[str], Source]) -> dict[str, Header]:
    """Decode images in parallel, and return their headers by key; good ones are kept, and not decoded again.

    A failure may be over the next time: a missing permission, a missing decoder, a device that was busy.

    Args:
        name: of the dataset; it names the file in the cache.
        stamps: by each image's key, the numbers, such as size and times, that it is decoded again for if they change.
    """
    # another Pillow may read less; a shorter stamp, of an earlier version, is enough if it agrees
    full = {key: [*stamp, PIL.__version__] for key, stamp in stamps.items()}
    path = cache_directory() / "scans" / f"{sha256(name.encode(errors='surrogateescape')).hexdigest()[:24]}.json"
    with _lock(path):
        cached: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            cached = read_json(path)
        headers = {key: header for key in stamps if (header := _kept_header(cached.get(key), full[key]))}
        if new := [key for key in stamps if key not in headers]:
            decoded = map_images(lambda key: _decode_header(key, open_source), new, "checking images")
            headers |= dict(zip(new, decoded, strict=True))
            entries = {key: [full[key], list(headers[key])] for key in stamps if headers[key].problem is None}
            with suppress(OSError):  # without the cache, the next start takes longer
                # compact, since there may be millions; ASCII, since a file's name may hold bytes that are not UTF-8
                write_json(path, entries, indent=None, ensure_ascii=True)
    return {key: headers[key] for key in stamps}


def _kept_header(entry: Any, stamp: list[Any]) -> Header | None:
    """Return the header in an entry of the cache if that is whole, of a good image and of this stamp."""
    match entry:
        case [list(kept), [bool(is_grey), int(height), int(width), None]] if kept and kept == stamp[: len(kept)]:
            return Header(is_grey, height, width)
    return None


def _lock(path: Path) -> AbstractContextManager[Any]:
    """Acquire a lock: one of many processes decodes, and the others read its results."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{path}.lock").acquire()
    except (OSError, NotImplementedError):  # a directory that is read-only, or whose file system has no locks
        return nullcontext()


def map_images(function: Callable[[Any], Any], items: Sequence[Any], description: str) -> list[Any]:
    """Apply a function that decodes an image to each item, in threads and with a progress bar."""
    from tqdm import tqdm

    hidden = True if len(items) < MIN_IMAGES_FOR_PROGRESS_BAR else None  # None: hidden without a terminal
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:  # decoders release the interpreter's lock
        return list(tqdm(pool.map(function, items), description, len(items), unit="img", disable=hidden))


def _decode_header(key: str, open_source: Callable[[str], Source]) -> Header:
    try:
        source = open_source(key)
        problem = _find_problem(source) if isinstance(source, str) else None if source else "is empty"
        if problem is None:
            return Header.read(source, key)
    except FileNotFoundError:
        problem = MISSING
    except OSError as error:
        problem = f"cannot be opened: {error.strerror}"
    except UnreadableItemError as error:
        problem = error.reason
    return Header(False, 0, 0, problem)


def _find_problem(path: str) -> str | None:
    if "\0" in path:  # which no path has
        return MISSING
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # before it is opened, since a pipe would block
        return "is a folder or a device, not a file"
    Path(path).open("rb").close()  # raises what a decoder would hide in a message of its own
    return None if status.st_size else "is empty"


def report_unusable(problems: dict[str, str], count: int, where: str, on_bad: str) -> None:
    """Name those of `count` images that cannot be used: ValueError for on_bad="raise", a warning for "skip"."""
    if not problems:
        return
    named = "; ".join(f"{key} {problem}" for key, problem in list(problems.items())[:MAX_NAMED_IMAGES])
    more = f"; and {len(problems) - MAX_NAMED_IMAGES} more" if len(problems) > MAX_NAMED_IMAGES else ""
    message = f"{len(problems)} of {count} images in {where} cannot be used: {named}{more}"
    if on_bad == "raise":
        raise ValueError(f"{message}. on_bad='skip' (--on-bad skip) leaves them out")
    warnings.warn(f"{message}. They are left out", stacklevel=2)
    if len(problems) == count:
        raise ValueError(f"{message}. None is left")
