"""Custom datasets, given from Python: any map-style or iterable dataset of dicts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from unet_denoiser.data.dataset import ImageDataset, StreamDataset, StreamIndex


class CustomDataset(ImageDataset):
    """A map-style dataset of {"image": floats (C, *spatial), conditions}; its first item sets channels and size.

    The global generators of torch, numpy and random are seeded by each item's position, so that the dataset's own
    random augmentation is repeated exactly when a run is resumed.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        if not len(data):
            raise ValueError("the dataset has no items")
        self.shape = _describe(self, check_item(data[0], "item 0"))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with _seed_generators(index) if isinstance(index, StreamIndex) else nullcontext():
            return check_item(self.data[int(index)], f"item {int(index)}", self.shape)


class CustomStream(StreamDataset):
    """An iterable dataset of dicts as for `CustomDataset`, iterated over again for each epoch.

    If it has a method `set_epoch`, that gets the epoch's number. To resume a run exactly, an epoch's order must be the
    same each time.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        first = next((check_item(item, "the first item") for item in data), None)
        if first is None:
            raise ValueError("the dataset has no items")
        self.shape = _describe(self, first)

    def read_epoch(self, epoch: int, seed: int) -> Iterator[Any]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        return iter(self.data)

    def decode(self, raw: Any, index: StreamIndex) -> dict[str, Any]:
        return check_item(raw, f"the item at position {index.position}", self.shape)


def as_dataset(data: Any) -> ImageDataset | StreamDataset:
    """Adapt any dataset for `make_loader`: a Hugging Face or custom one is wrapped, others are returned as they are.

    Raises:
        TypeError: `data` is not a dataset.
        ValueError: items that are not dicts with an image.
    """
    if isinstance(data, ImageDataset | StreamDataset):
        return data
    if type(data).__module__.split(".")[0] == "datasets":  # told by name, to import `datasets` only if it is used
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
        raise TypeError(f"data is a {type(data).__name__}; give a dataset of dicts with len() and [], or an iterable")
    return CustomDataset(data)


def _describe(described: CustomDataset | CustomStream, first: Mapping[str, Any]) -> tuple[int, ...]:
    """Set a dataset's attributes from its first item, and return the shape of the image."""
    shape = tuple(first["image"].shape)
    described.channels, described.image_size = shape[0], shape[1:]
    # torchvision's datasets call them `classes`
    names = getattr(described.data, "class_names", None) or getattr(described.data, "classes", None)
    described.class_names = None if names is None else [str(name) for name in names]
    described.vector_dim = len(first["vector"]) if "vector" in first else None
    described.context_dim = first["context"].shape[-1] if "context" in first else None
    described.concat_channels = len(first["concat"]) if "concat" in first else 0
    return shape


def check_item(item: Any, name: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Return an item with arrays as tensors and its image as float32.

    Raises:
        ValueError: the item is not a dict with an image of floats, of `shape` if that is given.
    """
    if not isinstance(item, Mapping) or "image" not in item:
        is_dict = isinstance(item, Mapping)
        found = f"has the keys {', '.join(map(str, item))}" if is_dict else f"is a {type(item).__name__}"
        raise ValueError(f"{name} of the dataset {found}; give dicts with 'image', for example {{'image': tensor}}")
    item = {key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for key, v in item.items()}
    image = item["image"]
    if not isinstance(image, torch.Tensor) or not image.is_floating_point() or image.ndim < 2:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(f"'image' in {name} is {found}; give a tensor (C, *spatial) of floats, in [-1, 1]")
    if shape is not None and tuple(image.shape) != shape:
        raise ValueError(f"'image' in {name} has shape {tuple(image.shape)}, but the first one has {shape}")
    return item | {"image": image.float()}


@contextmanager
def _seed_generators(index: StreamIndex) -> Iterator[None]:
    """Seed the global generators by seed and position inside the block, and restore their states after it."""
    states = np.random.get_state(), random.getstate()
    entropy = index.rng().integers(2**32, size=3).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(entropy[0])
        np.random.seed(entropy[1])
        random.seed(entropy[2])
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
