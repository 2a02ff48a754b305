"""Whether samples are copies of training images: their nearest ones, beside those of images never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.evaluation.metrics import nearest
from unet_denoiser.utils.images import save_grid

COMPARED = 256  # samples, and held-out images, whose pixels are compared
SEARCHED = 100_000  # training images they are compared with, at most
SIDE = 64  # larger pictures are compared at this size
SHOWN = 16
COPIES = 0.15  # share of samples in the closest 5 % of held-out images from which copies are likely


class Neighbours(NamedTuple):
    """Distances to the nearest training image in one space, of samples and of held-out images.

    space: "pixels" (root mean square per value) or the extractor's name (Euclidean).
    searched: training images.
    closer: share of samples closer than 95 % of the held-out images are; 0.05 is expected of new images.
    """

    space: str
    searched: int
    compared: int
    median: float
    held_out_median: float
    closer: float

    @property
    def looks_copied(self) -> bool:
        return self.closer >= COPIES


def compare_neighbours(space: str, searched: int, samples: Tensor, held_out: Tensor) -> Neighbours:
    """Judge distances to the nearest training image: those of samples (N,) by those of held-out images (M,)."""
    samples, held_out = samples.double().cpu(), held_out.double().cpu()
    # half of the ties count, so that a set compared with itself has 5 % however many are alike
    bound = held_out.quantile(0.05)
    below, at = (samples < bound).double().mean(), (samples == bound).double().mean()
    own_below, own_at = (held_out < bound).double().mean(), (held_out == bound).double().mean()
    share = ((0.05 - own_below) / own_at).clamp(0, 1) if own_at > 0 else torch.tensor(0.0)
    closer = float(below + share * at)
    return Neighbours(space, searched, len(samples), float(samples.median()), float(held_out.median()), closer)


def nearest_pixels(pictures: Tensor, data: ImageDataset, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
    """For each of (Q, C, *spatial) pictures in [-1, 1] the distance to its nearest image of the data, and its index.

    Distances are root mean squares per value; pictures of more than 64 pixels are scaled down to that first.

    Args:
        indices: the images that are searched.
    """
    queries = _small(pictures)
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64)
    found = torch.zeros(len(queries), dtype=torch.int64)
    for start in tqdm(range(0, len(indices), 256), "comparing pixels", unit_scale=256, unit="img", disable=None):
        part = torch.as_tensor(indices[start : start + 256])
        images = _small(torch.stack([data[i]["image"] for i in part.tolist()]))
        distances, rows = nearest(queries, images)
        closer = distances < best
        best, found = torch.where(closer, distances, best), torch.where(closer, part[rows], found)
    return best / queries.shape[1] ** 0.5, found


def save_pairs(
    pictures: Tensor, distances: Tensor, data: ImageDataset, neighbours: Sequence[Tensor], path: Path
) -> Path:
    """A picture of the samples that are closest to training images: samples above, their neighbours below.

    Args:
        pictures: (Q, C, H, W) samples in [-1, 1], with their distances (Q,).
        neighbours: the index of each sample's neighbour in the data (Q,), by pixels and by features; a row for each.
    """
    closest = distances.argsort()[:SHOWN]
    shown = [pictures[closest].cpu()]
    for indices in neighbours:
        shown.append(torch.stack([data[i]["image"] for i in indices[closest].tolist()]))
    return save_grid(torch.cat(shown), path, columns=len(closest), data_range=(-1.0, 1.0))


def _small(images: Tensor) -> Tensor:
    """(N, C, *spatial) -> (N, values), pictures of two axes scaled down to 64 pixels."""
    images = images.float()
    if images.ndim == 4 and (largest := max(images.shape[2:])) > SIDE:
        size = [max(1, round(n * SIDE / largest)) for n in images.shape[2:]]
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.flatten(1)
