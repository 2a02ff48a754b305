"""What every data set here is: items for training, what a network for them needs to know, and how images are framed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from unet_denoiser.recipe_data import DataConfig, ResizeMode


class UnreadableItemError(ValueError):
    """An item that cannot be read, and the reason; training takes another one instead."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.reason)


class Place(int):
    """An item's index that also knows its position in the endless stream of training, and so its own randomness.

    Being an int, it indexes any map-style data set. Equal seeds and positions give equal augmentation, whichever
    worker or process does it.
    """

    position: int
    seed: int

    def __new__(cls, index: int, position: int, seed: int) -> Place:
        place = super().__new__(cls, index)
        place.position, place.seed = position, seed
        return place

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        return int(self), self.position, self.seed

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.position, 0, 1])  # 1: not the numbers that order the epochs


class ImageData(Dataset[dict[str, Any]]):
    """A map-style data set of {"image": float32 (C, *spatial) in [-1, 1], conditions}, augmented where a `Place` asks.

    A class of one's own gives `__len__` and `__getitem__`; those here give `pixels` and `conditions` instead.

    channels: C. image_size: one int per spatial axis. class_names: in label order, or None without labels.
    captions: one per item, or None; an item then has its own as "caption". vector_dim: length of "vector", or None.
    context_dim, concat_channels: width of the tokens in "context", or None; channels of "concat" (see conditioned.py).
    buckets: the items of each size, where sizes differ; a batch is of one bucket. None: all items have `image_size`.
    """

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None = None
    captions: Sequence[str] | None = None
    vector_dim: int | None = None
    context_dim: int | None = None
    concat_channels: int = 0
    buckets: list[np.ndarray] | None = None
    in_memory: bool = False  # items cost next to nothing, so that worker processes would only cost
    labels: Tensor | None = None
    vectors: Tensor | None = None
    config: DataConfig | None = None
    background: Tensor | None = None  # (C,) in [-1, 1], what `pad` fills with

    def __len__(self) -> int:
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """(C, *spatial) uint8, uint16, or floats in [-1, 1], scaled but not yet cropped or padded."""
        raise NotImplementedError

    def size_of(self, index: int) -> tuple[int, ...]:
        """The size that this item is cropped or padded to."""
        return self.image_size

    def conditions(self, index: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.labels is not None:
            found["class_labels"] = self.labels[index]
        if self.vectors is not None:
            found["vector"] = self.vectors[index]
        if self.captions is not None:
            found["caption"] = self.captions[int(index)]
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = to_float(self.pixels(index))
        rng = index.rng() if isinstance(index, Place) else None
        return {"image": augment(image, self.size_of(index), self.config, rng, self.background)} | self.conditions(
            index
        )


def augment(
    image: Tensor,
    size: tuple[int, ...],
    config: DataConfig | None,
    rng: np.random.Generator | None,
    background: Tensor | None = None,
) -> Tensor:
    """Crop or pad a scaled image (C, *spatial) to `size`, and flip it; without `rng` nothing is random."""
    offsets = [0.5] * len(size)
    if rng is not None and config is not None and config.resize_mode == "random_crop":
        offsets = rng.random(len(size)).tolist()
    if tuple(image.shape[1:]) != size:
        image = _frame(image, size, offsets, background)
    if rng is not None and config is not None and config.horizontal_flip and rng.random() < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def _frame(image: Tensor, size: tuple[int, ...], offsets: Sequence[float], background: Tensor | None) -> Tensor:
    for axis, (wanted, offset) in enumerate(zip(size, offsets, strict=True), start=1):
        if (spare := image.shape[axis] - wanted) > 0:
            image = image.narrow(axis, min(spare, int(offset * (spare + 1))), wanted)
    if tuple(image.shape[1:]) == size:
        return image
    fill = image.new_ones(len(image)) if background is None else background
    framed = fill.view(-1, *[1] * len(size)).expand(-1, *size).clone()
    starts = [(n - m) // 2 for n, m in zip(size, image.shape[1:], strict=True)]
    framed[:, *[slice(i, i + n) for i, n in zip(starts, image.shape[1:], strict=True)]] = image
    return framed


def scaled_size(found: Sequence[int], size: Sequence[int], mode: ResizeMode) -> tuple[int, ...]:
    """The size an image is scaled to before it is cropped (to cover `size`) or padded (to fit into it)."""
    if mode == "stretch":
        return tuple(size)
    ratios = [n / m for n, m in zip(size, found, strict=True)]
    ratio = min(ratios) if mode == "pad" else max(ratios)
    scaled = [max(1, round(m * ratio)) for m in found]
    # the axis that decides comes out exactly, whatever the rounding
    return tuple(min(n, s) if mode == "pad" else max(n, s) for n, s in zip(size, scaled, strict=True))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 or uint16 over its whole range -> float32 in [-1, 1]; floats stay as they are."""
    largest = {torch.uint8: 255, torch.uint16: 65535}.get(pixels.dtype)
    return pixels.float() if largest is None else pixels.float() / (largest / 2) - 1


def per_axis(size: int | Sequence[int], axes: int) -> tuple[int, ...]:
    sizes = (size,) * axes if isinstance(size, int) else tuple(size)
    sizes = sizes * axes if len(sizes) == 1 else sizes
    if len(sizes) != axes or min(sizes) < 1:
        raise ValueError(f"image_size={size} must be a positive int, or {axes} of them")
    return sizes


def encode_labels(
    values: Sequence[Any] | np.ndarray, names: Sequence[str] | None, where: str
) -> tuple[Tensor, list[str]]:
    """Labels that are names or integers from 0 -> (N,) int64 and the class names in label order.

    Args:
        names: the classes in label order; default: the names sorted, or the integers themselves.
        where: what holds the labels, for messages.
    """
    array = np.asarray(values)
    if np.issubdtype(array.dtype, np.integer):
        if array.min() < 0:
            raise ValueError(f"labels of {where} go down to {array.min()}; give names, or integers from 0")
        if names is None and array.max() >= 1000 + 10 * len(array):
            raise ValueError(f"labels of {where} go up to {array.max()}; give names, or integers from 0 without gaps")
        known = list(names) if names is not None else [str(i) for i in range(int(array.max()) + 1)]
        if names is None and 2 * (present := len(np.unique(array))) < len(known):
            warnings.warn(
                f"{where} has images of {present} of the {len(known)} classes 0 to {len(known) - 1}; the others would "
                "be sampled untrained; number them without gaps, or give names",
                stacklevel=3,
            )
        if array.max() >= len(known):
            raise ValueError(f"class_names has {len(known)} entries, labels go up to {array.max()} in {where}")
        return torch.from_numpy(array.astype(np.int64)), known
    if array.dtype.kind not in "UO" or not all(isinstance(value, str) for value in values):
        raise ValueError(f"labels of {where} are of type {array.dtype}; give names, or integers from 0")
    known = list(names) if names is not None else sorted(set(values))
    index = {name: i for i, name in enumerate(known)}
    if unknown := sorted(set(values) - set(index)):
        raise ValueError(f"{where} has the class {unknown[0]!r}, which is not one of class_names: {', '.join(known)}")
    return torch.tensor([index[value] for value in values]), known


def encode_vectors(columns: Mapping[str, Sequence[Any] | np.ndarray], where: str) -> Tensor:
    """Numeric columns -> (N, D) float32 as they are; a network learns best from values of about unit size."""
    try:
        array = np.stack([np.asarray(values, np.float64) for values in columns.values()], 1)
    except (TypeError, ValueError):
        array = np.full((1, 1), np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"vector_columns={tuple(columns)} of {where} must hold a finite number in every row")
    return torch.from_numpy(array.astype(np.float32))


def refuse_options(config: DataConfig, names: Sequence[str], kind: str) -> None:
    """ValueError for an option that was given and would do nothing for this kind of data."""
    default = DataConfig(config.source)
    if given := [name for name in names if getattr(config, name) != getattr(default, name)]:
        raise ValueError(f"{given[0]}={getattr(config, given[0])!r} means nothing for {kind}; leave it out")
