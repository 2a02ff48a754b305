"""Memorization: distances of samples to their nearest training images, judged by those of images that are no copies.

In pixels, plain or blurry samples lie near many training images without being copies: look at the nearest pairs.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.evaluation.images import progress_bar, read_images, spread_indices, stack_images
from unet_denoiser.evaluation.metrics import nearest_neighbours
from unet_denoiser.utils.images import save_grid

MAX_SEARCHED_IMAGES = 100_000  # training images that samples are compared with; reading more would take too long
MAX_COMPARED_IMAGES = 256  # samples, and reference images, whose pixels are compared; also training images at a time
MAX_BATCH_VALUES = 2**26  # values of the training images that are in memory at a time: 256 MiB of float32
MAX_SIDE_PIXELS = 64  # larger images are scaled down to this before they are compared
NUM_PAIRS = 16  # samples in the picture
CLOSE_SHARE = 0.05  # share of the reference images that are called close, and the share expected of new images
MIN_COPY_SHARE = 0.15  # share of samples that are close from which copies are likely


class Neighbours(NamedTuple):
    """Distances to the nearest training image in one space: of samples, and of reference images."""

    space: str  # "pixels" (root mean square per value) or the extractor's name (Euclidean)
    searched: int  # training images
    compared: int  # samples
    median: float  # of the samples' distances
    held_out_median: float  # of the reference images' distances
    closer: float  # share of samples closer than 95 % of the reference images are; 0.05 is expected of new images
    held_out_compared: int  # reference images

    @property
    def copies_are_likely(self) -> bool:
        """Return True if more samples are close to training images than is likely of new images.

        Of few images some are close by chance, so the share must also be 3 standard errors above the expected one (of
        the difference of two binomial shares).
        """
        variance = CLOSE_SHARE * (1 - CLOSE_SHARE) * (1 / self.compared + 1 / self.held_out_compared)
        return self.closer >= max(MIN_COPY_SHARE, CLOSE_SHARE + 3 * math.sqrt(variance))

    @property
    def ratio(self) -> float | None:
        """Median of the samples over that of the reference images; None if most of these are in the training set."""
        return self.median / self.held_out_median if self.held_out_median > 0 else None


class NearestImages(NamedTuple):
    """A comparison; for (some of) its samples distances (Q,) and indices (Q,) of the nearest training images."""

    comparison: Neighbours
    distances: Tensor
    indices: Tensor


def compare_neighbours(space: str, searched: int, samples: Tensor, reference: Tensor) -> Neighbours:
    """Judge the samples' distances to the nearest training image (N,) by those of reference images (M,).

    The reference must be distances that new images of the same distribution would have: those of held-out images, or
    those of training images to the nearest other one (see `compare_without_held_out`).
    """
    samples, reference = samples.double().cpu(), reference.double().cpu()
    bound = reference.quantile(CLOSE_SHARE)
    below, at = (samples < bound).double().mean(), (samples == bound).double().mean()
    # ties count in part, so that a set compared with itself has 5 % however many are alike
    reference_below, reference_at = (reference < bound).double().mean(), (reference == bound).double().mean()
    tie_share = ((CLOSE_SHARE - reference_below) / reference_at).clamp(0, 1) if reference_at > 0 else torch.tensor(0.0)
    closer, medians = float(below + tie_share * at), (float(samples.median()), float(reference.median()))
    return Neighbours(space, searched, len(samples), *medians, closer, len(reference))


def compare_pixels(
    samples: Tensor, reference: Tensor, data: ImageDataset, indices: np.ndarray, own_indices: Sequence[int] = ()
) -> NearestImages:
    """Compare samples with training images in pixels, by the distances of reference images.

    Args:
        samples: (Q, C, *spatial), finite, in the range of the data.
        reference: (M, C, *spatial), see `compare_neighbours`.
        indices: of the training images, of which at most MAX_SEARCHED_IMAGES are searched, evenly spaced.
        own_indices: of the reference images, where they are training images: none is compared with itself.
    """
    indices, count = indices[spread_indices(len(indices), MAX_SEARCHED_IMAGES).numpy()], len(samples)
    own = torch.tensor([-1] * count + list(own_indices or [-1] * len(reference)))
    distances, nearest = _nearest_pixels(torch.cat([samples, reference]), data, indices, own)
    comparison = compare_neighbours("pixels", len(indices), distances[:count], distances[count:])
    return NearestImages(comparison, distances[:count], nearest[:count])


def compare_without_held_out(samples: Tensor, data: ImageDataset, indices: np.ndarray) -> NearestImages:
    """Compare samples with training images where there are no others, by leaving some training images out in turn.

    The reference are the distances of training images to the nearest other one. That is sound: a new image of the same
    distribution could change places with the image left out, so both have the same distribution of distances. Keeping
    half of the data out of the search would be sound as well, but would hide copies of that half.

    Args:
        samples: (Q, C, *spatial), finite.
        indices: of the training images, at least 2, all of the samples' size.
    """
    left_out = read_images(data, indices[spread_indices(len(indices), _batch_size(samples)).numpy()])
    return compare_pixels(samples, torch.stack([*left_out.values()]), data, indices, list(left_out))


def _nearest_pixels(
    queries: Tensor, data: ImageDataset, indices: np.ndarray, own_indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the root mean square distance (Q,) and the index (Q,) of the image nearest to each query, not its own."""
    size, queries = _batch_size(queries), _flatten_small(queries)
    distances, nearest = torch.full((len(queries),), torch.inf, dtype=torch.float64), torch.full_like(own_indices, -1)
    with progress_bar(len(indices), "comparing pixels") as bar:
        for start in range(0, len(indices), size):
            batch = read_images(data, indices[start : start + size])
            bar.update(min(size, len(indices) - start))
            if not batch:
                continue
            part, images = torch.tensor(list(batch)), _flatten_small(torch.stack([*batch.values()]))
            found, positions = nearest_neighbours(queries, images, exclude=own_indices[:, None] == part)
            closer = found < distances
            distances, nearest = torch.where(closer, found, distances), torch.where(closer, part[positions], nearest)
    return distances / queries.shape[1] ** 0.5, nearest


def save_pairs(samples: Tensor, data: ImageDataset, nearest: Sequence[NearestImages], path: Path) -> Path:
    """Save a picture of the samples that are closest to training images, with these below.

    Args:
        samples: (Q, C, H, W) in [-1, 1].
        nearest: their nearest training images in each space, a row of the picture for each; the first one's distances
            say which samples are closest.
    """
    closest = nearest[0].distances.argsort()[:NUM_PAIRS]
    images = [stack_images(data, found.indices[closest].numpy()) for found in nearest]
    return save_grid(torch.cat([samples[closest], *images]), path, columns=len(closest), data_range=(-1.0, 1.0))


def _batch_size(images: Tensor) -> int:
    """Return how many images of this size are in memory at a time."""
    return min(MAX_COMPARED_IMAGES, max(1, MAX_BATCH_VALUES // images[0].numel()))


def _flatten_small(images: Tensor) -> Tensor:
    """(N, C, *spatial) -> (N, values), 2-d images scaled down to MAX_SIDE_PIXELS."""
    images = images.float()
    if images.ndim == 4 and (largest := max(images.shape[2:])) > MAX_SIDE_PIXELS:
        size = [max(1, round(n * MAX_SIDE_PIXELS / largest)) for n in images.shape[2:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.flatten(1)
