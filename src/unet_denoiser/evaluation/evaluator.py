"""How good samples are: figures of their features beside those of images never trained on, and whether they copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.evaluation.feature_cache import BATCH, data_features, stacked
from unet_denoiser.evaluation.feature_extractors import Extractor, extract, load_extractor, versions
from unet_denoiser.evaluation.memorization import COMPARED, SEARCHED, compare_neighbours, nearest_pixels, save_pairs
from unet_denoiser.evaluation.metrics import class_accuracy, manifold_overlap, nearest
from unet_denoiser.evaluation.metrics import frechet_distance as frechet_distance
from unet_denoiser.evaluation.metrics import kernel_distance as kernel_distance
from unet_denoiser.evaluation.report import Figures, Report

FEWEST = 2000


def evaluate(
    samples: Any,
    data: Any,
    *,
    held_out: Any = None,
    labels: Tensor | None = None,
    extractor: Any = "auto",
    num_data: int = 10_000,
    allow_few: bool = False,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
    about: dict[str, Any] | None = None,
) -> Report:
    """Compare samples with the images a network was trained on, and with others that it never saw.

    Args:
        samples: (N, C, H, W) in [-1, 1]; or a data set; or anything with len() that iterates over batches of samples.
        data: the training images: a data set, or an array (M, C, H, W), uint8 or floats in [-1, 1].
        held_out: images that were not trained on, likewise (default: half of the images of `data` that are used are
            taken for those; the other half is what everything is compared with).
        labels: (N,) the classes that the samples were asked to be of (default: their own attribute `labels`).
        extractor: as in `load_extractor`.
        num_data: how many training images are used for features, in a random order; 0 takes all.
        allow_few: go on with fewer than 2,000 samples.
        device: what the extractor runs on.
        folder: where to write report.json and the picture of the closest pairs (default: nowhere).
        about: what else shall be said in the report about the samples.

    Raises:
        ValueError: too few samples, or data that do not fit each other or the extractor.
        ImportError, OSError: an extractor that is not there.
    """
    check_count(len(samples), allow_few)
    data, loaded = _images(data, "data"), load_extractor(extractor, device)
    there = None if held_out is None else _images(held_out, "held_out")
    if isinstance(samples, Tensor | np.ndarray) or hasattr(samples, "__getitem__"):
        samples = _images(samples, "samples")
    labels = getattr(samples, "labels", None) if labels is None else labels
    for name, other in (("samples", samples), ("held_out", there)):
        _check_shape(name, other, data)
    used, held, held_used = _split(data, there, num_data, len(samples))
    reference = data_features(data, used, loaded, "training images")
    floor = data_features(held, held_used, loaded, "held-out images")
    features, pictures, rows = _sample_features(samples, loaded)
    few = min(len(features), len(floor))
    report = Report(
        about=_about(loaded, reference, data, there, len(features), about or {}),
        samples=_figures(features, reference),
        held_out=_figures(floor, reference),
        samples_at_held_out_count=_figures(_spread(features, few), reference) if few < len(features) else None,
        neighbours=[],
        accuracy=_accuracy(reference, _labels(data, used), floor, _labels(held, held_used), features, labels),
    )
    searched = np.setdiff1d(np.arange(len(data)), held_used) if there is None else np.arange(len(data))
    searched = searched[np.linspace(0, len(searched) - 1, min(SEARCHED, len(searched))).astype(int)]
    distances, in_pixels = nearest_pixels(pictures, data, searched)
    compared = torch.stack([held[i]["image"] for i in held_used[:COMPARED].tolist()])
    of_held_out, _ = nearest_pixels(compared, data, searched)
    feature_distances, in_features = nearest(features, reference)
    report.neighbours.append(compare_neighbours("pixels", len(searched), distances, of_held_out))
    if loaded.name != "pixels":
        feature_floor, _ = nearest(floor, reference)
        report.neighbours.append(compare_neighbours(loaded.name, len(used), feature_distances, feature_floor))
    if folder is not None:
        below = [in_pixels, torch.from_numpy(used)[in_features[rows]]][: len(report.neighbours)]
        report.pictures.append(save_pairs(pictures, distances, data, below, Path(folder) / "neighbours.png"))
        report.write(Path(folder))
    return report


def _sample_features(samples: Any, extractor: Extractor) -> tuple[Tensor, Tensor, Tensor]:
    """All samples' features; and the pictures of some from all over, with their positions."""
    kept = set(torch.linspace(0, len(samples) - 1, min(COMPARED, len(samples))).long().tolist())
    pictures: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        position = 0
        for batch in _sample_batches(samples):
            if not batch.isfinite().all():
                raise ValueError("samples are not finite numbers; doctor tells why")
            pictures.extend(batch[i].clamp(-1, 1).cpu() for i in range(len(batch)) if position + i in kept)
            position += len(batch)
            yield batch.clamp(-1, 1)

    features = extract(extractor, batches())
    return features, torch.stack(pictures), torch.tensor(sorted(kept))


def _sample_batches(samples: Any) -> Iterable[Tensor]:
    if not isinstance(samples, ImageDataset):
        return samples
    parts = np.array_split(np.arange(len(samples)), -(-len(samples) // BATCH))
    return (stacked(samples, part) for part in tqdm(parts, "features of samples", unit_scale=BATCH, disable=None))


def _images(images: Any, name: str) -> ImageDataset:
    """A data set that can be indexed, of arrays too."""
    if isinstance(images, Tensor):
        images = images.detach().cpu().float().numpy() if images.is_floating_point() else images.cpu().numpy()
    if isinstance(images, np.ndarray) and np.issubdtype(images.dtype, np.floating) and images.size:
        if images.min() >= 0:
            warnings.warn(f"{name} have no value below 0; floats are taken to be in [-1, 1]", stacklevel=3)
        if np.abs(images).max() < 1.5:  # what unclipped samplers leave; more is refused as another range
            images = images.clip(-1, 1)
    found = ArrayDataset(images) if isinstance(images, np.ndarray) else as_dataset(images)
    if not isinstance(found, ImageDataset):
        raise ValueError(f"{name} is a stream; give a data set with len() and []")
    if found.buckets is not None:
        raise ValueError(f"{name} has images of several sizes; load it without aspect_buckets")
    return found


def check_count(count: int, allow_few: bool) -> None:
    """ValueError for fewer samples than figures mean something for."""
    if count < 6:
        raise ValueError(f"num_samples={count} must be at least 6, for nearest neighbours; {FEWEST:,} mean something")
    if count < FEWEST and not allow_few:
        raise ValueError(
            f"num_samples={count} is fewer than {FEWEST:,}: a Frechet distance is then mostly bias, which falls with "
            "their number, and the other figures are noise; make more, or allow_few to see them all the same"
        )


def _check_shape(name: str, other: Any, data: ImageDataset) -> None:
    if not isinstance(other, ImageDataset):
        return
    shapes = [(found.channels, *found.image_size) for found in (other, data)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{name} has images of shape {shapes[0]}, the data {shapes[1]}; they must be the same")


def _split(
    data: ImageDataset, held_out: ImageDataset | None, num_data: int, samples: int
) -> tuple[np.ndarray, ImageDataset, np.ndarray]:
    """The training images that are used; the held-out data and those of its images that are used: as many as samples.

    In a random order, the same each time.
    """
    order = np.random.default_rng(0).permutation(len(data))[: num_data or None]
    if len(order) < 12:
        raise ValueError(f"data has {len(order)} images to compare with; give more")
    if held_out is None:
        half = len(order) // 2
        return order[half:], data, order[:half][:samples]
    return order, held_out, np.random.default_rng(1).permutation(len(held_out))[:samples]


def _figures(features: Tensor, reference: Tensor) -> Figures:
    count = min(len(features), len(reference))
    overlap = manifold_overlap(_spread(reference, count), _spread(features, count))
    return Figures(
        len(features),
        len(reference),
        frechet_distance(features, reference),
        kernel_distance(features, reference),
        count,
        overlap,
    )


def _spread(features: Tensor, count: int) -> Tensor:
    """So many rows from all over."""
    return features[torch.linspace(0, len(features) - 1, count).long()]


def _labels(data: ImageDataset, indices: np.ndarray) -> Tensor | None:
    return None if data.labels is None else data.labels[torch.from_numpy(indices)]


def _accuracy(
    reference: Tensor,
    known: Tensor | None,
    floor: Tensor,
    floor_labels: Tensor | None,
    features: Tensor,
    labels: Tensor | None,
) -> dict[str, float] | None:
    if known is None or floor_labels is None or labels is None or len(known.unique()) < 2:
        return None
    if len(labels) != len(features):
        raise ValueError(f"labels has {len(labels)} entries for {len(features)} samples")
    found, of_floor = class_accuracy((reference, known), (features, labels), (floor, floor_labels))
    return {"samples": found, "held_out": of_floor}


def _about(
    extractor: Extractor,
    reference: Tensor,
    data: ImageDataset,
    held_out: ImageDataset | None,
    count: int,
    more: dict[str, Any],
) -> dict[str, Any]:
    def described(found: ImageDataset) -> dict[str, Any]:
        config = found.config
        return {"source": "arrays" if config is None else config.source, "count": len(found)}

    words = "no held-out images given, so half of the images used are taken for them"
    floor: dict[str, Any] = {"short": "half of the data", "words": words}
    if held_out is not None:
        floor = {"short": "held-out", **described(held_out)}
        floor["words"] = f"held out: {floor['count']:,} images of {floor['source']}"
    return {
        "samples": {"count": count, **more},
        "data": described(data),
        "held_out": floor,
        "extractor": {
            "name": extractor.name,
            "width": reference.shape[1],
            "frechet_name": extractor.frechet_name,
            "kernel_name": extractor.kernel_name,
        },
        "versions": versions(),
    }
