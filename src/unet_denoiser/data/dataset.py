"""What every data set here is: items for training, what a network for them needs to know, and how images are framed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.transforms import augment, to_float


class StreamIndex(int):
    """An item's index that also knows its position in the endless stream of training, and so its own randomness.

    Being an int, it indexes any map-style data set. Equal seeds and positions give equal augmentation, whichever
    worker or process does it.
    """

    position: int
    seed: int

    def __new__(cls, index: int, position: int, seed: int) -> StreamIndex:
        place = super().__new__(cls, index)
        place.position, place.seed = position, seed
        return place

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]
        return int(self), self.position, self.seed

    def rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.position, 0, 1])  # 1: not the numbers that order the epochs


class ImageDataset(Dataset[dict[str, Any]]):
    """A map-style dataset of {"image": float32 (C, *spatial) in [-1, 1], conditions}; a `StreamIndex` has it augmented.

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
        rng = index.rng() if isinstance(index, StreamIndex) else None
        return {"image": augment(image, self.size_of(index), self.config, rng, self.background)} | self.conditions(
            index
        )


def refuse_options(config: DataConfig, names: Sequence[str], kind: str) -> None:
    """ValueError for an option that was given and would do nothing for this kind of data."""
    default = DataConfig(config.source)
    if given := [name for name in names if getattr(config, name) != getattr(default, name)]:
        raise ValueError(f"{given[0]}={getattr(config, given[0])!r} means nothing for {kind}; leave it out")


ATTRIBUTES = (
    *("channels", "image_size", "class_names", "captions", "buckets", "in_memory", "config"),
    *("vector_dim", "context_dim", "concat_channels"),
)


class DatasetWrapper(ImageDataset):
    """A data set that changes another's items."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data
        for name in ATTRIBUTES:
            setattr(self, name, getattr(data, name))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]

    def conditions(self, index: int) -> dict[str, Any]:
        return self.data.conditions(index)

    def size_of(self, index: int) -> tuple[int, ...]:
        return self.data.size_of(index)


class StreamDataset(IterableDataset[dict[str, Any]]):
    """What a network needs to know of a stream, and how to read it; the attributes are those of `ImageDataset`."""

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None = None
    captions: None = None
    vector_dim: int | None = None
    context_dim: int | None = None
    concat_channels: int = 0

    def epoch(self, number: int, seed: int) -> Iterator[Any]:
        """The items of an epoch, not yet decoded, in an order that depends on `seed` and its number alone."""
        raise NotImplementedError

    def decode(self, raw: Any, place: StreamIndex) -> dict[str, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The items of the first epoch, to look at; training reads through `StreamBatches`."""
        return (self.decode(raw, StreamIndex(i, i, 0)) for i, raw in enumerate(self.epoch(0, 0)))
