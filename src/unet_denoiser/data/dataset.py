"""Base classes of all datasets: items by index, items of a stream, and wrappers that change items."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.transforms import augment, to_float


class StreamIndex(int):
    """The index of an item, with its position in the endless stream of training and the seed.

    An int, so that it indexes any map-style dataset. The augmentation of an item depends on seed and position alone,
    whichever worker or process decodes it: a resumed run sees the same crops and flips.
    """

    position: int
    seed: int

    def __new__(cls, index: int, position: int, seed: int) -> Self:
        self = super().__new__(cls, index)
        self.position, self.seed = position, seed
        return self

    def __getnewargs__(self) -> tuple[int, int, int]:  # type: ignore[override]  # to be sent to worker processes
        return int(self), self.position, self.seed

    def rng(self) -> np.random.Generator:
        """Return the generator for this item's augmentation."""
        return np.random.default_rng([self.seed, self.position, 0, 1])  # 1: apart from the order's numbers


class _Attributes:
    """The attributes of both kinds of datasets."""

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None = None
    captions: Sequence[str] | None = None
    vector_dim: int | None = None
    context_dim: int | None = None
    concat_channels: int = 0
    origins: Mapping[str, str] = {}


class ImageDataset(_Attributes, Dataset[dict[str, Any]]):
    """A map-style dataset of {"image": float32 (C, *spatial) in [-1, 1]} and conditions by name.

    A `StreamIndex` returns the item augmented, any other index as it is. Subclasses define `__len__` and either
    `__getitem__` or `pixels`.

    Attributes:
        channels, image_size: C, and one int per spatial axis.
        labels, class_names: (N,) int64, and the names in label order; or None.
        captions: one per item, or None; item i then has "caption".
        vectors, vector_dim: (N, vector_dim), and the length of "vector"; or None.
        context_dim, concat_channels: width of the tokens in "context", or None; channels of "concat", or 0.
        origins: where "class_labels", "caption" and "vector" come from, as in {"class_labels": "its sub-folders"}.
        buckets: indices of the items of each size; a batch is of one bucket. None: all items have `image_size`.
        in_memory: items cost next to nothing, so worker processes would only add cost.
        background: (C,) in [-1, 1], to pad with.
    """

    buckets: list[np.ndarray] | None = None
    in_memory: bool = False
    labels: Tensor | None = None
    vectors: Tensor | None = None
    config: DataConfig | None = None
    background: Tensor | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def pixels(self, index: int) -> Tensor:
        """Return (C, *spatial) uint8, uint16, or floats in [-1, 1], scaled but not yet cropped or padded."""
        raise NotImplementedError

    def item_size(self, index: int) -> tuple[int, ...]:
        """Return the spatial size that the item is cropped or padded to."""
        return self.image_size

    def conditions(self, index: int) -> dict[str, Any]:
        """Return the item without its image."""
        columns: Any = {"class_labels": self.labels, "vector": self.vectors, "caption": self.captions}
        return {name: values[int(index)] for name, values in columns.items() if values is not None}

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = to_float(self.pixels(index))
        rng = index.rng() if isinstance(index, StreamIndex) else None
        image = augment(image, self.item_size(index), self.config, rng=rng, background=self.background)
        return {"image": image} | self.conditions(index)


class DatasetWrapper(ImageDataset):
    """A dataset that changes the items of another one."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data
        for name in (*_Attributes.__annotations__, "buckets", "in_memory", "config"):
            setattr(self, name, getattr(data, name))

    def __len__(self) -> int:
        return len(self.data)

    def conditions(self, index: int) -> dict[str, Any]:
        return self.data.conditions(index)

    def item_size(self, index: int) -> tuple[int, ...]:
        return self.data.item_size(index)


class StreamDataset(_Attributes, IterableDataset[dict[str, Any]]):
    """A dataset that is read from first to last; attributes and items are those of `ImageDataset`."""

    def read_epoch(self, epoch: int, seed: int) -> Iterator[Any]:
        """Yield the epoch's items, not yet decoded, in an order that depends on `epoch` and `seed` alone."""
        raise NotImplementedError

    def decode(self, raw: Any, index: StreamIndex) -> dict[str, Any]:
        """Return the item, decoded and augmented."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the items of the first epoch, for inspection; training reads through `StreamBatches`."""
        return (self.decode(raw, StreamIndex(i, i, 0)) for i, raw in enumerate(self.read_epoch(0, 0)))


def refuse_options(config: DataConfig, names: Sequence[str], kind: str) -> None:
    """Raise ValueError if an option is given that has no effect on this kind of data."""
    default = DataConfig(config.source)
    if given := [name for name in names if getattr(config, name) != getattr(default, name)]:
        raise ValueError(f"{given[0]}={getattr(config, given[0])!r} means nothing for {kind}; leave it out")
