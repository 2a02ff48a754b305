"""Features of datasets, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.evaluation.feature_extractors import Extractor, extract
from unet_denoiser.evaluation.images import BATCH_SIZE, stack_images
from unet_denoiser.utils.cache import MappedArray, compute_once, digest, fingerprint


def dataset_features(data: ImageDataset, indices: np.ndarray, extractor: Extractor, progress: str = "images") -> Tensor:
    """Compute the features (N, D) of a dataset's images at these indices, or read them from the cache.

    They are cached if data and extractor have a name: by source, sizes and times of change of its files, options of
    the data, indices and extractor.

    Args:
        progress: name of the images in the progress bar.
    """

    def batches() -> Iterator[Tensor]:
        starts = range(0, len(indices), BATCH_SIZE)
        for start in tqdm(starts, f"features of {progress}", unit_scale=BATCH_SIZE, unit="img", disable=None):
            yield stack_images(data, indices[start : start + BATCH_SIZE])

    def compute(folder: Path) -> None:
        np.save(folder / "features.npy", extract(extractor, batches()).numpy())

    key = _cache_key(data, indices, extractor)
    if key is None:
        return extract(extractor, batches())
    return torch.from_numpy(np.array(MappedArray(compute_once("features", key, compute) / "features.npy").array))


def _cache_key(data: ImageDataset, indices: np.ndarray, extractor: Extractor) -> str | None:
    config = data.config
    if config is None or extractor.key is None:
        return None
    path = Path(config.source)
    if not path.exists() and not config.source.startswith(("digits", "hf:")):
        return None
    options = repr(sorted(asdict(config).items()))
    files = fingerprint([path]) if path.exists() else ""
    return digest([options, files, str(len(data)), indices.astype(np.int64).tobytes(), extractor.key])
