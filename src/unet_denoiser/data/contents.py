"""The contents of a dataset in a few short digests, to notice at a resume that the data changed."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unet_denoiser.data.dataset import DatasetWrapper, ImageDataset, StreamDataset
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.data.sources.huggingface import HubStream
from unet_denoiser.data.sources.image_folder import ImageFolder
from unet_denoiser.data.wrappers.concat import ConcatConditionDataset
from unet_denoiser.utils.cache import digest

MAX_READ_BYTES, MAX_MAPPED_IMAGES = 2**28, 256  # of images in memory; of a mapped file
WORDS = {
    "names": "other names or another order of the images",
    "images": "other images",
    "labels": "other labels",
    "class_names": "other classes",
    "captions": "other captions",
    "vectors": "other vectors",
    "paired names": "other images in the folder of concat",
    "paired images": "other images in the folder of concat",
}


def describe_contents(data: ImageDataset | StreamDataset) -> dict[str, Any]:
    """Return the number of items, and digests of names, images, labels, captions and vectors, as far as there are any.

    No image is decoded: of files their sizes count, of arrays some of their pixels, of streams their first rows.
    """
    found: dict[str, Any] = {}
    while isinstance(data, DatasetWrapper):
        if isinstance(data, ConcatConditionDataset) and isinstance(data.paired, ImageFolder):
            found |= {f"paired {name}": value for name, value in _describe_folder(data.paired).items()}
        data = data.data
    found["class_names"] = digest(data.class_names or ())
    if isinstance(data, HubStream):
        return found | {"images": digest(map(str, data.headers))}
    if isinstance(data, StreamDataset):
        return found
    found["items"] = len(data)
    if isinstance(data, ImageFolder):
        found |= _describe_folder(data)
    if isinstance(data, ArrayDataset):
        found["images"] = _digest_arrays(data)
    elif hasattr(data, "headers"):
        found.setdefault("images", digest(map(str, data.headers)))
    labels, vectors = data.labels, data.vectors
    found["labels"] = None if labels is None else zlib.crc32(labels.numpy().tobytes())
    found["vectors"] = None if vectors is None else zlib.crc32(vectors.numpy().tobytes())
    found["captions"] = None if data.captions is None else digest(data.captions)
    return found


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say in words how two descriptions differ, as in "42 images, 41 before"; None if they do not."""
    changed = [name for name in before if name in now and before[name] != now[name]]
    words = [f"{now['items']:,} images, {before['items']:,} before"] if "items" in changed else []
    words += [text for name, text in WORDS.items() if name in changed]
    return ", ".join(dict.fromkeys(words)) or None


def _describe_folder(data: ImageFolder) -> dict[str, str]:
    sizes = (Path(data.source(i)).stat().st_size if Path(data.source(i)).exists() else -1 for i in range(len(data)))
    return {"names": digest(data.files), "images": digest(map(str, sizes))}


def _digest_arrays(data: ArrayDataset) -> int:
    array = data.images.numpy() if isinstance(data.images, torch.Tensor) else data.images.array
    most = max(1, MAX_READ_BYTES // max(1, array[0].nbytes)) if data.in_memory else MAX_MAPPED_IMAGES
    checksum = zlib.crc32(str((array.shape, array.dtype)).encode())
    for i in np.unique(np.linspace(0, len(array) - 1, min(most, len(array))).astype(int)):
        checksum = zlib.crc32(np.ascontiguousarray(array[i]).tobytes(), checksum)
    return checksum
