"""Data sets that can only be read from first to last, as batches of an endless stream."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from typing import Any

from torch.utils.data import IterableDataset

from unet_denoiser.data.base import Place, UnreadableItemError


class StreamData(IterableDataset[dict[str, Any]]):
    """What a network needs to know of a stream, and how to read it; the attributes are those of `ImageData`."""

    channels: int
    image_size: tuple[int, ...]
    class_names: list[str] | None = None
    captions: None = None
    vector_dim: int | None = None

    def epoch(self, number: int, seed: int) -> Iterator[Any]:
        """The items of an epoch, not yet decoded, in an order that depends on `seed` and its number alone."""
        raise NotImplementedError

    def decode(self, raw: Any, place: Place) -> dict[str, Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The items of the first epoch, to look at; training reads through `StreamBatches`."""
        return (self.decode(raw, Place(i, i, 0)) for i, raw in enumerate(self.epoch(0, 0)))


class StreamBatches(IterableDataset[list[dict[str, Any]]]):
    """Batches `start` to `stop` of a stream that starts again after each epoch; of each, one process's part.

    It reads what comes before `start` without decoding it. It is for one worker process, which decodes in threads.
    """

    def __init__(
        self, data: StreamData, batch_size: int, seed: int, start: int, stop: int, part: slice, threads: int = 1
    ) -> None:
        self.data, self.batch_size, self.seed, self.threads = data, batch_size, seed, threads
        self.start, self.stop, self.part = start, stop, part
        self._warned = False

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        endless = chain.from_iterable(self._epoch(number) for number in count())
        raw = islice(endless, self.start * self.batch_size, None)
        with ThreadPoolExecutor(self.threads) as pool:
            for step in range(self.start, self.stop):
                rows, first = list(islice(raw, self.batch_size)), step * self.batch_size
                places = range(self.batch_size)[self.part]
                jobs = [pool.submit(self._decode, rows, i, first) for i in places]
                yield [job.result() for job in jobs]

    def _epoch(self, number: int) -> Iterator[Any]:
        empty = True
        for row in self.data.epoch(number, self.seed):
            empty = False
            yield row
        if empty:
            raise ValueError(f"the data set has no items in epoch {number}")

    def _decode(self, rows: list[Any], index: int, first: int) -> dict[str, Any]:
        """Item `index` of the batch, or the next one that can be read."""
        for i in [*range(index, len(rows)), *range(index)]:
            try:
                return self.data.decode(rows[i], Place(i, first + index, self.seed))
            except UnreadableItemError as error:
                if not self._warned:
                    warnings.warn(f"{error}; it is replaced by another (this is said once)", stacklevel=1)
                    self._warned = True
        raise ValueError(f"none of the {len(rows)} items from {first} on can be read")
