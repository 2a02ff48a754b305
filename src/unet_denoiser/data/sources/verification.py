"""Decoding every image once before training, so that a bad one is found now and not at step 40,000."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from unet_denoiser.data.transforms import GREY, Source, UnreadableItemError, open_image
from unet_denoiser.utils.cache import cache_directory
from unet_denoiser.utils.files import read_json, write_json

NAMED = 5  # bad items that a message names
PROGRESS_FROM = 1000  # images from which on a bar is shown


class Header(NamedTuple):
    """What the scan found: is it grey, its height and width once it is turned upright, or what is wrong with it."""

    grey: bool
    height: int
    width: int
    problem: str | None = None


def verify_images(name: str, stamps: dict[str, list[int]], open_source: Callable[[str], Source]) -> dict[str, Header]:
    """Decode every image in parallel, but for those that the cache knows by key and stamp.

    Args:
        name: what is scanned; it names the cache's file.
        stamps: for each image's key what changes with it (bytes, time of the last change).
        open_source: the path or content of a key's image.
    """
    path = cache_directory() / "scans" / f"{sha256(name.encode()).hexdigest()[:24]}.json"
    with _one_at_a_time(path):
        known = _read(path)
        found = {key: Header(*known[key][1]) for key, stamp in stamps.items() if known.get(key, [None])[0] == stamp}
        if new := [key for key in stamps if key not in found]:
            found |= _decode_all(new, open_source)
            entries = {key: [stamps[key], list(found[key])] for key in stamps}
            with suppress(OSError):  # a cache that cannot be written costs the next start some time, no more
                # compact, for there may be millions; ASCII, for a file's name may hold bytes that are not UTF-8
                write_json(path, entries, indent=None, ensure_ascii=True)
    return {key: found[key] for key in stamps}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _one_at_a_time(path: Path) -> Any:
    """A lock, so that of many processes one scans and the others read what it found."""
    from filelock import FileLock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
        lock.release()
    except (OSError, NotImplementedError):
        return nullcontext()
    return lock


def _decode_all(keys: Sequence[str], open_source: Callable[[str], Source]) -> dict[str, Header]:
    from tqdm import tqdm

    hidden = True if len(keys) < PROGRESS_FROM else None  # None: hidden where there is no terminal
    with ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4)) as pool:  # decoders release the interpreter's lock
        headers = pool.map(lambda key: _header(key, open_source), keys)
        return dict(zip(keys, tqdm(headers, "checking images", len(keys), unit="img", disable=hidden), strict=True))


def _header(key: str, open_source: Callable[[str], Source]) -> Header:
    try:
        source = open_source(key)
        if (os.path.getsize(source) if isinstance(source, str) else len(source)) == 0:
            return Header(False, 0, 0, "is empty")
        image = open_image(source, key)
    except FileNotFoundError:
        return Header(False, 0, 0, "is missing")
    except OSError as error:
        return Header(False, 0, 0, f"cannot be opened: {error.strerror}")
    except UnreadableItemError as error:
        return Header(False, 0, 0, error.reason)
    return header_of(image)


def header_of(image: Image.Image) -> Header:
    return Header(image.mode in GREY, image.height, image.width)


def too_small(header: Header, size: Sequence[int]) -> str | None:
    """The problem of an image that would have to be enlarged more than twice, or None."""
    if 2 * header.height >= size[0] and 2 * header.width >= size[1]:
        return None
    return f"is {header.height}x{header.width}, less than half of image_size {size[0]}x{size[1]}"


def report_unusable(bad: dict[str, str], count: int, where: str, on_bad: str) -> None:
    """Name what cannot be used: ValueError for on_bad="raise", a warning for "skip"."""
    if not bad:
        return
    named = "; ".join(f"{key} {problem}" for key, problem in list(bad.items())[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    message = f"{len(bad)} of {count} images in {where} cannot be used: {named}{more}"
    if on_bad == "raise":
        raise ValueError(f"{message}. on_bad='skip' (--on-bad skip) leaves them out")
    warnings.warn(f"{message}. They are left out", stacklevel=2)
    if len(bad) == count:
        raise ValueError(f"{message}. None is left")
