"""Features of data sets, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.evaluation.feature_extractors import Extractor, extract
from unet_denoiser.utils.cache import MappedArray, compute_once, digest, fingerprint

BATCH = 64


def data_features(data: ImageDataset, indices: np.ndarray, extractor: Extractor, words: str = "images") -> Tensor:
    """(N, D) features of a data set's images at these indices, kept on disk where data and extractor can be named.

    Those of data that were loaded by a name are kept under it, the files' sizes and times of change, the options of the
    data, the indices and the extractor.
    """

    def batches() -> Iterator[Tensor]:
        parts = range(0, len(indices), BATCH)
        for start in tqdm(parts, f"features of {words}", unit_scale=BATCH, unit="img", disable=None):
            yield stacked(data, indices[start : start + BATCH])

    key = _key(data, indices, extractor)
    if key is None:
        return extract(extractor, batches())

    def compute(folder: Path) -> None:
        np.save(folder / "features.npy", extract(extractor, batches()).numpy())

    return torch.from_numpy(np.array(MappedArray(compute_once("features", key, compute) / "features.npy").array))


def _key(data: ImageDataset, indices: np.ndarray, extractor: Extractor) -> str | None:
    config = data.config
    if config is None or extractor.key is None:
        return None
    path = Path(config.source)
    named = path.exists() or config.source.startswith(("digits", "hf:"))
    if not named:
        return None
    options = sorted(asdict(config).items())
    known = fingerprint([path]) if path.exists() else ""
    return digest([repr(options), known, str(len(data)), indices.astype(np.int64).tobytes(), extractor.key])


def stacked(data: ImageDataset, indices: np.ndarray) -> Tensor:
    def image(index: int) -> Tensor:
        return data[index]["image"]

    if not isinstance(data, EncodedImages):
        return torch.stack([image(i) for i in indices.tolist()])
    with ThreadPoolExecutor() as pool:  # decoding files
        return torch.stack(list(pool.map(image, indices.tolist())))
