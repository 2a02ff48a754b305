"""Data sets of one's own, handed over from Python: any map-style or iterable one of dicts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from unet_denoiser.data.dataset import ImageDataset, StreamDataset, StreamIndex


class CustomDataset(ImageDataset):
    """A map-style data set of {"image": (C, *spatial) floats, conditions}, of its first item's channels and size.

    Its own random augmentation (torch's, numpy's and random's global generators) is seeded by each item's position, so
    that training goes on exactly.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        if not len(data):
            raise ValueError("the data set has no items")
        first = check_item(data[0], "item 0")
        self.shape = _describe(self, first)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not isinstance(index, StreamIndex):
            return check_item(self.data[int(index)], f"item {int(index)}", self.shape)
        with _seeded(index):
            return check_item(self.data[int(index)], f"item {int(index)}", self.shape)


class CustomStream(StreamDataset):
    """An iterable data set of dicts like those of `CustomDataset`; it is iterated over again for each epoch.

    One with a method `set_epoch` is told the epoch's number. For exact resuming its order must be the same each time.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        first = next((check_item(item, "the first item") for item in data), None)
        if first is None:
            raise ValueError("the data set has no items")
        self.shape = _describe(self, first)

    def epoch(self, number: int, seed: int) -> Iterator[Any]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(number)
        return iter(self.data)

    def decode(self, raw: Any, place: StreamIndex) -> dict[str, Any]:
        return check_item(raw, f"the item at position {place.position}", self.shape)


def as_dataset(data: Any) -> ImageDataset | StreamDataset:
    """Any data set as one that `make_loader` takes: ours as they are, `datasets`' and one's own adapted.

    Raises:
        TypeError: something that is no data set.
        ValueError: items that are no dicts with an image.
    """
    if isinstance(data, ImageDataset | StreamDataset):
        return data
    if type(data).__module__.split(".")[0] == "datasets":
        import datasets

        from unet_denoiser.data.sources.huggingface import HubDataset, HubStream

        if isinstance(data, datasets.Dataset):
            return HubDataset(data)
        if isinstance(data, datasets.IterableDataset):
            return HubStream(data)
        raise TypeError(f"data is a {type(data).__name__}; give one split of it, for example data['train']")
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        return CustomStream(data)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(f"data is a {type(data).__name__}; give a data set of dicts with len() and [], or an iterable")
    return CustomDataset(data)


def _describe(described: CustomDataset | CustomStream, first: Mapping[str, Any]) -> tuple[int, ...]:
    """Set what a network needs to know of the data, by their first item; the shape of its image."""
    shape = tuple(first["image"].shape)
    described.channels, described.image_size = shape[0], shape[1:]
    described.class_names = _class_names(described.data)
    described.vector_dim = len(first["vector"]) if "vector" in first else None
    described.context_dim = first["context"].shape[-1] if "context" in first else None
    described.concat_channels = len(first["concat"]) if "concat" in first else 0
    return shape


def check_item(item: Any, name: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """The item with tensors for arrays; ValueError for one that training cannot use, by its name."""
    if not isinstance(item, Mapping) or "image" not in item:
        found = (
            f"has the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else f"is a {type(item).__name__}"
        )
        raise ValueError(f"{name} of the data set {found}; give dicts with 'image', for example {{'image': tensor}}")
    item = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in item.items()}
    image = item["image"]
    if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.ndim < 2:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"'image' in {name} is {found}; give a tensor (C, *spatial) of floats, in [-1, 1]")
    if shape is not None and tuple(image.shape) != shape:
        raise ValueError(f"'image' in {name} has shape {tuple(image.shape)}, but the first one has {shape}")
    return item | {"image": image.float()}


@contextmanager
def _seeded(place: StreamIndex) -> Iterator[None]:
    """The global generators seeded by the place, and put back afterwards."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    entropy = place.rng().integers(2**32, size=3).tolist()
    torch.default_generator.manual_seed(entropy[0])
    np.random.seed(entropy[1])
    random.seed(entropy[2])
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def _class_names(data: Any) -> list[str] | None:
    """Names that a data set brings as `class_names`, or as `classes` as torchvision's do."""
    names = getattr(data, "class_names", None) or getattr(data, "classes", None)
    return None if names is None else [str(name) for name in names]
