"""Batches for training, in an endless order that depends on the seed and the position alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from unet_denoiser.data.arrays import ArrayData
from unet_denoiser.data.base import ImageData


class Place(NamedTuple):
    """An item's number in its data set, and its position in the endless stream, which its augmentation depends on."""

    item: int
    position: int


class EndlessBatches(Sampler[list[Place]]):
    """Batches `start` to `stop` of an endless stream: a new random order each epoch, without gaps between epochs.

    Any batch size fits any data set, and training goes on at any batch with the items it would have had. The order
    depends on `seed` and the epoch's number alone. Each of several processes takes its part of every batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        if batch_size % num_processes:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_processes} processes")
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop
        self.share = batch_size // num_processes
        self.offset = self.share * process_index

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Place]]:
        stream = self._stream(self.start * self.batch_size)
        for _ in range(len(self)):
            batch = [next(stream) for _ in range(self.batch_size)]
            yield batch[self.offset : self.offset + self.share]

    def _stream(self, position: int) -> Iterator[Place]:
        while True:
            epoch, offset = divmod(position, self.size)
            for index in np.random.default_rng([self.seed, epoch]).permutation(self.size)[offset:].tolist():
                yield Place(index, position)
                position += 1


class Placed(Dataset[dict[str, Any]]):
    """A data set as the loader's workers see it: items by `Place`."""

    def __init__(self, data: ImageData, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, place: Place) -> dict[str, Any]:
        return self.data[place.item]


def make_loader(
    data: ImageData,
    batch_size: int,
    *,
    seed: int,
    start: int,
    stop: int,
    num_processes: int = 1,
    process_index: int = 0,
    num_workers: int | None = None,
    pin_memory: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Batches `start` to `stop` of the endless stream of a data set; of each, this process's part.

    Args:
        batch_size: that of all processes together.
        seed: of order and augmentation.
        num_workers: processes that load data (default: none for data in memory, else up to 4).
        pin_memory: for a GPU.

    Raises:
        ValueError: a batch size that the processes cannot share.
    """
    batches = EndlessBatches(len(data), batch_size, seed, start, stop, num_processes, process_index)
    if num_workers is None:
        num_workers = 0 if isinstance(data, ArrayData) else min(4, os.cpu_count() or 1)
    return DataLoader(Placed(data, seed), batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory)
