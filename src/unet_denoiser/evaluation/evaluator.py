"""Evaluation of samples: metrics of their features beside those of unseen images, and a search for copies."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.paths import local_path
from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.evaluation import memorization, metrics
from unet_denoiser.evaluation.feature_extractors import Extractor, dataset_features, load_extractor, package_versions
from unet_denoiser.evaluation.images import image_batches, spread_indices, stack_images
from unet_denoiser.evaluation.report import ClassAccuracy, DataSource, ExtractorInfo, Figures, Report, Setup

MIN_SAMPLES = 2000
MIN_NEIGHBOUR_SAMPLES = 6  # `manifold_overlap` needs more than 5
MIN_DATA_IMAGES = 12


class ImageSet(NamedTuple):
    """Images of a dataset: indices (N,) and features (N, D)."""

    data: ImageDataset
    indices: np.ndarray
    features: Tensor

    @property
    def labels(self) -> Tensor | None:
        """Classes (N,); None without classes."""
        return None if self.data.labels is None else self.data.labels[torch.from_numpy(self.indices)]


class SampleSet(NamedTuple):
    """Features (N, D) of all samples; images (Q, C, *spatial) in [-1, 1] and indices (Q,) of some, evenly spaced."""

    features: Tensor
    images: Tensor
    indices: Tensor


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
        samples: (N, C, H, W) in [-1, 1]; or a dataset; or anything with len() that iterates over batches of samples.
        data: the training images: a dataset, or an array (M, C, H, W), uint8 or floats in [-1, 1].
        held_out: images that were not trained on, likewise (default: half of the images of `data` that are used stand
            in for these, and everything is compared with the other half).
        labels: (N,) classes that the samples were made for (default: the attribute `labels` of `samples`).
        extractor: as in `load_extractor`.
        num_data: number of training images used for features, in a random order; 0 takes all.
        allow_few: go on with fewer than 2,000 samples.
        folder: where to write report.json and the picture of the closest pairs (default: nowhere).
        about: more to tell about the samples in the report.

    Raises:
        ValueError: too few samples, or data that do not fit each other or the extractor.
        ImportError, OSError: an extractor that is not available.
    """
    check_count(len(samples), allow_few)
    folder = None if folder is None else local_path(folder)
    data, extractor = _as_image_dataset(data, "data"), load_extractor(extractor, device)
    unseen = None if held_out is None else _as_image_dataset(held_out, "held_out")
    if isinstance(samples, Tensor | np.ndarray) or hasattr(samples, "__getitem__"):
        samples = _as_image_dataset(samples, "samples")
    labels = getattr(samples, "labels", None) if labels is None else labels
    data_shape = (data.channels, *data.image_size)
    for name, other in (("samples", samples), ("held_out", unseen)):
        if isinstance(other, ImageDataset) and (shape := (other.channels, *other.image_size)) != data_shape:
            raise ValueError(f"{name} has images of shape {shape}, the data {data_shape}; they must be the same")
    train, reference = _split_data(data, unseen, num_data, len(samples), extractor)
    made = _read_samples(samples, extractor)
    searched = np.setdiff1d(np.arange(len(data)), reference.indices if unseen is None else [])
    held_out_images = stack_images(reference.data, reference.indices[: memorization.MAX_COMPARED_IMAGES])
    nearest = [memorization.compare_pixels(made.images, held_out_images, data, searched)]
    if extractor.name != "pixels":
        nearest.append(_compare_features(made, reference, train, extractor.name))
    few = _spread(made.features, len(reference.features))
    report = Report(
        about=_describe(extractor, train, unseen, {"count": len(made.features), **(about or {})}),
        samples=_compute_figures(made.features, train.features),
        held_out=_compute_figures(reference.features, train.features),
        samples_at_held_out_count=_compute_figures(few, train.features) if len(few) < len(made.features) else None,
        neighbours=[found.comparison for found in nearest],
        accuracy=_measure_accuracy(train, reference, made, labels),
    )
    if folder is not None:
        report.pictures.append(memorization.save_pairs(made.images, data, nearest, folder / "neighbours.png"))
        report.write(folder)
    return report


def check_count(count: int, allow_few: bool) -> None:
    """Raise ValueError for fewer samples than the figures need to mean something."""
    if count < MIN_NEIGHBOUR_SAMPLES:
        least = f"at least {MIN_NEIGHBOUR_SAMPLES}, for nearest neighbours"
        raise ValueError(f"num_samples={count} must be {least}; {MIN_SAMPLES:,} mean something")
    if count < MIN_SAMPLES and not allow_few:
        raise ValueError(
            f"num_samples={count} is fewer than {MIN_SAMPLES:,}: a Frechet distance is then mostly bias, which falls "
            "with their number, and the other figures are noise; make more, or allow_few to see them all the same"
        )


def _as_image_dataset(images: Any, name: str) -> ImageDataset:
    """Return arrays or a dataset as a dataset that can be indexed, of images of one size."""
    if isinstance(images, Tensor):
        images = images.detach().cpu().float().numpy() if images.is_floating_point() else images.cpu().numpy()
    if isinstance(images, np.ndarray) and np.issubdtype(images.dtype, np.floating) and images.size:
        if images.min() >= 0:
            warnings.warn(f"{name} have no value below 0; floats are taken to be in [-1, 1]", stacklevel=3)
        if np.abs(images).max() < 1.5:  # unclipped samplers leave such values; larger ones mean another range
            images = images.clip(-1, 1)
    data = ArrayDataset(images) if isinstance(images, np.ndarray) else as_dataset(images)
    if not isinstance(data, ImageDataset):
        raise ValueError(f"{name} is a stream; give a dataset with len() and []")
    if data.buckets is not None:
        raise ValueError(f"{name} has images of several sizes; load it without aspect_buckets")
    return data


def _split_data(
    data: ImageDataset, held_out: ImageDataset | None, num_data: int, num_samples: int, extractor: Extractor
) -> tuple[ImageSet, ImageSet]:
    """Choose training images, and as many held-out images as samples, in a random order that is the same each time."""
    used = np.random.default_rng(0).permutation(len(data))[: num_data or None]
    if len(used) < MIN_DATA_IMAGES:
        raise ValueError(f"data has {len(used)} images to compare with; give at least {MIN_DATA_IMAGES}")
    if held_out is None:
        half = len(used) // 2
        held_out, held_out_used, used = data, used[:half], used[half:]
    else:
        held_out_used = np.random.default_rng(1).permutation(len(held_out))
    held_out_used = held_out_used[:num_samples]
    train = ImageSet(data, used, dataset_features(data, used, extractor, "training images"))
    features = dataset_features(held_out, held_out_used, extractor, "held-out images")
    return train, ImageSet(held_out, held_out_used, features)


def _read_samples(samples: Any, extractor: Extractor) -> SampleSet:
    """Compute the features of samples, which are read only once."""
    indices = spread_indices(len(samples), memorization.MAX_COMPARED_IMAGES)
    kept, start = set(indices.tolist()), 0
    features: list[Tensor] = []
    images: list[Tensor] = []
    if isinstance(samples, ImageDataset):
        samples = image_batches(samples, np.arange(len(samples)), "features of samples")
    for batch in samples:
        if not batch.isfinite().all():
            raise ValueError("samples are not finite numbers; doctor tells why")
        x = batch.clamp(-1, 1)
        features.append(extractor(x).cpu())
        images.extend(x[i].cpu() for i in range(len(x)) if start + i in kept)
        start += len(x)
    return SampleSet(torch.cat(features), torch.stack(images), indices)


def _compute_figures(features: Tensor, reference: Tensor) -> Figures:
    count = min(len(features), len(reference))
    return Figures(
        images=len(features),
        reference=len(reference),
        frechet=metrics.frechet_distance(features, reference),
        kernel=metrics.kernel_distance(features, reference),
        overlap_count=count,
        overlap=metrics.manifold_overlap(_spread(reference, count), _spread(features, count)),
    )


def _spread(features: Tensor, count: int) -> Tensor:
    return features[spread_indices(len(features), count)]


def _compare_features(
    samples: SampleSet, held_out: ImageSet, train: ImageSet, space: str
) -> memorization.NearestImages:
    """Compare all samples with the training images by features; tell the nearest ones of `samples.images`."""
    distances, nearest = metrics.nearest_neighbours(samples.features, train.features)
    reference, _ = metrics.nearest_neighbours(held_out.features, train.features)
    comparison = memorization.compare_neighbours(space, len(train.indices), distances, reference)
    shown = samples.indices
    return memorization.NearestImages(comparison, distances[shown], torch.from_numpy(train.indices)[nearest[shown]])


def _measure_accuracy(
    train: ImageSet, held_out: ImageSet, samples: SampleSet, labels: Tensor | None
) -> ClassAccuracy | None:
    """Classify samples made for the classes `labels`, and held-out images; None without classes."""
    if train.labels is None or held_out.labels is None or labels is None or len(train.labels.unique()) < 2:
        return None
    if len(labels) != len(samples.features):
        raise ValueError(f"labels has {len(labels)} entries for {len(samples.features)} samples")
    tests = (samples.features, labels), (held_out.features, held_out.labels)
    return ClassAccuracy(*metrics.class_accuracy((train.features, train.labels), *tests))


def _describe(extractor: Extractor, train: ImageSet, held_out: ImageDataset | None, samples: dict[str, Any]) -> Setup:
    def source(data: ImageDataset) -> DataSource:
        return DataSource("arrays" if data.config is None else data.config.source, len(data))

    info = ExtractorInfo(extractor.name, train.features.shape[1], extractor.frechet_name, extractor.kernel_name)
    unseen = None if held_out is None else source(held_out)
    return Setup(samples, source(train.data), unseen, info, package_versions())
