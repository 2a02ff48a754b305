"""Batches for training, in an endless order that depends on the seed and the position alone."""

from __future__ import annotations

import os
import signal
import time
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from unet_denoiser.data.dataset import ImageDataset, StreamDataset, StreamIndex
from unet_denoiser.data.transforms import UnreadableItemError

PREFETCHED = 4  # batches per worker
REPLACEMENTS = 100  # unreadable items in a row after which the data are taken to be gone


class EndlessBatches(Sampler[list[StreamIndex]]):
    """Batches `start` to `stop` of an endless stream: a new random order each epoch, without gaps between epochs.

    Any batch size fits any data set, and training goes on at any batch with the items it would have had. The order
    depends on `seed` and the epoch's number alone. Each of several processes takes its part of every batch.

    Args:
        buckets: the number of items, or one array of indices per bucket; a batch is of one bucket. A bucket's items
            that fill no whole batch in an epoch come first in its next, so that each still comes once per epoch.
    """

    def __init__(
        self,
        buckets: int | Sequence[np.ndarray],
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        num_processes: int = 1,
        process_index: int = 0,
    ) -> None:
        self.buckets = [np.arange(buckets)] if isinstance(buckets, int) else list(buckets)
        self.sizes = np.array([len(bucket) for bucket in self.buckets])
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.part = process_slice(batch_size, num_processes, process_index)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[StreamIndex]]:
        last = (self.start + len(self.buckets) + 1) * self.batch_size // int(self.sizes.sum()) + 1
        first = bisect_right(range(last + 1), self.start, key=lambda epoch: int(self._before(epoch).sum())) - 1
        for epoch in count(first):
            for batch, (bucket, turn) in enumerate(self._epoch(epoch), start=int(self._before(epoch).sum())):
                if batch >= self.stop:
                    return
                if batch >= self.start:
                    yield self._places(batch, bucket, turn)

    def _before(self, epoch: int) -> np.ndarray:
        """How many batches each bucket gave in the epochs before this one."""
        return epoch * self.sizes // self.batch_size

    def _epoch(self, epoch: int) -> Iterator[tuple[int, int]]:
        """The epoch's batches in their order: the bucket, and how many batches it gave before."""
        turns = self._before(epoch)
        order = np.repeat(np.arange(len(turns)), self._before(epoch + 1) - turns)
        for bucket in np.random.default_rng([self.seed, epoch, 0, 2]).permutation(order).tolist():
            yield bucket, int(turns[bucket])
            turns[bucket] += 1

    def _places(self, batch: int, bucket: int, turn: int) -> list[StreamIndex]:
        offsets = range(self.batch_size)[self.part]
        items = [self._item(bucket, turn * self.batch_size + i) for i in offsets]
        return [
            StreamIndex(item, batch * self.batch_size + i, self.seed) for item, i in zip(items, offsets, strict=True)
        ]

    def _item(self, bucket: int, position: int) -> int:
        epoch, offset = divmod(position, int(self.sizes[bucket]))
        known, order = self._orders.get(bucket, (-1, self.sizes))
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch, bucket]).permutation(self.buckets[bucket])
            self._orders[bucket] = epoch, order
        return int(order[offset])


def process_slice(batch_size: int, num_processes: int, process_index: int) -> slice:
    """The part of each batch that a process takes; ValueError for one that cannot be shared."""
    if batch_size % num_processes:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_processes} processes")
    share = batch_size // num_processes
    return slice(share * process_index, share * (process_index + 1))


class Replacing(Dataset[dict[str, Any]]):
    """A data set whose items that cannot be read are replaced by the next ones of their size, with one warning."""

    def __init__(self, data: ImageDataset) -> None:
        self.data = data
        self._warned = torch.zeros(1, dtype=torch.bool).share_memory_()  # by all workers
        self._buckets = data.buckets or [np.arange(len(data))]

    def __getitem__(self, place: StreamIndex) -> dict[str, Any]:
        try:
            return self.data[place]
        except UnreadableItemError as error:
            if not self._warned:
                warnings.warn(f"{error}; it is replaced by another (this is said once)", stacklevel=1)
                self._warned.fill_(True)
        bucket = next(bucket for bucket in self._buckets if int(place) in bucket)
        position = int(np.searchsorted(bucket, int(place)))
        for i in range(1, min(len(bucket), REPLACEMENTS)):
            try:
                return self.data[StreamIndex(int(bucket[(position + i) % len(bucket)]), place.position, place.seed)]
            except UnreadableItemError as error:
                last = error
        raise ValueError(f"{min(len(bucket), REPLACEMENTS)} items in a row cannot be read, the last: {last}")


def collate(items: list[dict[str, Any]]) -> Any:
    """Stack items; captions stay behind, since a network takes them as "context"."""
    return default_collate([{name: v for name, v in item.items() if not isinstance(v, str)} for item in items])


def make_loader(
    data: ImageDataset | StreamDataset,
    batch_size: int,
    *,
    seed: int,
    start: int,
    stop: int,
    num_processes: int = 1,
    process_index: int = 0,
    num_workers: int | None = None,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader[Any]:
    """Batches `start` to `stop` of the endless stream of a data set; of each, this process's part.

    They do not depend on the number of workers or processes, nor on where they start. Workers live as long as the
    loader's iterator, so over all epochs.

    Args:
        batch_size: that of all processes together.
        seed: of order and augmentation.
        num_workers: processes that load data (default: none for data in memory, else up to 4). A stream has one, and
            this many threads that decode in it.
        pin_memory: for a GPU.
        multiprocessing_context: how workers start: "fork", "spawn" or "forkserver" (default: Python's own).

    Raises:
        ValueError: a batch size that the processes cannot share.
    """
    workers = default_workers(data) if num_workers is None else num_workers
    options: dict[str, Any] = {"collate_fn": collate, "pin_memory": pin_memory}
    if workers:
        options |= {"prefetch_factor": PREFETCHED, "multiprocessing_context": multiprocessing_context}
        options |= {"worker_init_fn": outlive_signals}
    if isinstance(data, StreamDataset):
        part = process_slice(batch_size, num_processes, process_index)
        batches = StreamBatches(data, batch_size, seed, start, stop, part, max(1, workers))
        return DataLoader(batches, batch_size=None, num_workers=min(1, workers), **options)
    buckets = data.buckets or len(data)
    sampler = EndlessBatches(buckets, batch_size, seed, start, stop, num_processes, process_index)
    return DataLoader(Replacing(data), batch_sampler=sampler, num_workers=workers, **options)


def default_workers(data: ImageDataset | StreamDataset) -> int:
    if isinstance(data, ImageDataset) and data.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores)


class DataTimer:
    """Iterates over a loader and measures which share of the time its user waits for it.

    It warns once when that is above a fifth after the first `warm_up` batches, in which workers start.
    """

    limit = 0.2

    def __init__(self, batches: Iterable[Any], warm_up: int = 20) -> None:
        self.batches, self.warm_up = batches, warm_up
        self.number, self._warned = 0, False
        self._waited = self._worked = 0.0  # seconds since the last call of `wait_share`
        self._total = [0.0, 0.0]  # seconds waited and worked since the warm-up

    def __iter__(self) -> Iterator[Any]:
        iterator, asked = iter(self.batches), time.perf_counter()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            given = time.perf_counter()
            yield batch
            back = time.perf_counter()
            self._count(given - asked, back - given)
            asked = back

    def wait_share(self) -> float:
        """The share of the time spent waiting for data since the last call, 0 to 1."""
        total = self._waited + self._worked
        share = self._waited / total if total else 0.0
        self._waited = self._worked = 0.0
        return share

    def _count(self, waited: float, worked: float) -> None:
        self.number += 1
        self._waited, self._worked = self._waited + waited, self._worked + worked
        if self.number <= self.warm_up:
            return
        self._total = [self._total[0] + waited, self._total[1] + worked]
        share = self._total[0] / (sum(self._total) or 1.0)
        if self.number >= 2 * self.warm_up and share > self.limit and not self._warned:
            self._warned = True
            warnings.warn(
                f"training waits for data in {share:.0%} of the time; more num_workers, cache_images, or images that "
                "are already scaled to image_size would help",
                stacklevel=3,
            )


class StreamBatches(IterableDataset[list[dict[str, Any]]]):
    """Batches `start` to `stop` of a stream that starts again after each epoch; of each, one process's part.

    It reads what comes before `start` without decoding it. It is for one worker process, which decodes in threads.
    """

    def __init__(
        self, data: StreamDataset, batch_size: int, seed: int, start: int, stop: int, part: slice, threads: int = 1
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
                return self.data.decode(rows[i], StreamIndex(i, first + index, self.seed))
            except UnreadableItemError as error:
                if not self._warned:
                    warnings.warn(f"{error}; it is replaced by another (this is said once)", stacklevel=1)
                    self._warned = True
        raise ValueError(f"none of the {len(rows)} items from {first} on can be read")


def outlive_signals(worker: int) -> None:
    """Have a worker that loads data go on serving the step that is to be finished, when it is signalled as well.

    Ctrl-C in a terminal, `timeout` and job schedulers signal all processes of a group. SIGTERM ends it after a while,
    since that is also how it is told to go. To be a DataLoader's `worker_init_fn`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(10) and None)
