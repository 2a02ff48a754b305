"""Batches for training, in an endless order that depends on the seed and the position alone.

A run that is resumed at step n gets the batches it would have had: nothing but n is stored.
"""

import os
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from unet_denoiser.data.dataset import ImageDataset, StreamDataset, StreamIndex
from unet_denoiser.data.transforms import UnreadableItemError
from unet_denoiser.data.workers import SafeLoader, describe_worker_errors, ignore_signals

ALL = slice(None)
PREFETCHED_BATCHES = 4  # per worker
MAX_UNREADABLE_ITEMS = 100  # in a row, after which the data are taken to be gone


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
    """Load batches `start` to `stop` of the endless stream of a dataset; of each batch, this process's slice.

    A batch is a dict of tensors: "image" (B, C, *spatial) in [-1, 1] and the conditions by name (B, ...), with B =
    batch_size / num_processes. It does not depend on the number of workers or processes, nor on `start`.

    Args:
        batch_size: of all processes together.
        seed: of order and augmentation.
        num_workers: processes that load data (default: 0 for data in memory, else one per core, up to 4). They live
            over all epochs. A stream has one at most, which decodes in this many threads.
        multiprocessing_context: how workers start: "fork", "spawn" or "forkserver" (default: Python's own).

    Raises:
        ValueError: the batch size is not a multiple of the number of processes.
    """
    if num_workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = 0 if isinstance(data, ImageDataset) and data.in_memory else min(4, cores)
    options: dict[str, Any] = {"collate_fn": collate, "pin_memory": pin_memory}
    if num_workers:
        options |= {"prefetch_factor": PREFETCHED_BATCHES, "multiprocessing_context": multiprocessing_context}
        options |= {"worker_init_fn": ignore_signals}
    part = process_slice(batch_size, num_processes, process_index)
    if isinstance(data, StreamDataset):
        batches = StreamBatches(data, batch_size, seed, start, stop, part, threads=max(1, num_workers))
        return SafeLoader(batches, batch_size=None, num_workers=min(1, num_workers), **options)
    sampler = EndlessBatches(data.buckets or len(data), batch_size, seed, start, stop, part)
    with describe_worker_errors():
        dataset = FaultTolerantDataset(data, share=num_workers > 0)
    return SafeLoader(dataset, batch_sampler=sampler, num_workers=num_workers, **options)


def collate(items: list[dict[str, Any]]) -> Any:
    """Stack items into a batch; captions are left out, since a network takes them as "context"."""
    return default_collate([{name: v for name, v in item.items() if not isinstance(v, str)} for item in items])


def process_slice(batch_size: int, num_processes: int, process_index: int) -> slice:
    """Return a process's slice of each batch; ValueError if the batch cannot be divided evenly."""
    if batch_size % num_processes:
        raise ValueError(f"batch_size={batch_size} must be a multiple of the {num_processes} processes")
    share = batch_size // num_processes
    return slice(share * process_index, share * (process_index + 1))


class EndlessBatches(Sampler[list[StreamIndex]]):
    """Batches `start` to `stop` of an endless stream: a new random order each epoch, without gaps between epochs.

    The order depends on `seed` and the epoch's number alone, so the stream can begin at any batch. Any batch size fits
    any dataset.

    Args:
        buckets: the number of items, or one array of indices per bucket; a batch is of one bucket. Items that do not
            fill a batch at the end of a bucket's epoch come first in its next one, so each comes once per epoch.
        part: of each batch, the slice of this process (default: all).
    """

    def __init__(
        self, buckets: int | Sequence[np.ndarray], batch_size: int, seed: int, start: int, stop: int, part: slice = ALL
    ) -> None:
        self.buckets = [np.arange(buckets)] if isinstance(buckets, int) else list(buckets)
        self.sizes = np.array([len(bucket) for bucket in self.buckets])
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.indices = range(batch_size)[part]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # the current epoch of each bucket, and its order

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[StreamIndex]]:
        # find the epoch of batch `start`; `last` begins after it, since each bucket postpones less than one batch
        last = (self.start + len(self.buckets) + 1) * self.batch_size // int(self.sizes.sum()) + 1
        first = bisect_right(range(last + 1), self.start, key=lambda epoch: int(self._count_before(epoch).sum())) - 1
        for epoch in count(first):
            for batch, (bucket, turn) in enumerate(self._order(epoch), start=int(self._count_before(epoch).sum())):
                if batch >= self.stop:
                    return
                if batch >= self.start:
                    # the item is that of the bucket's own stream; the position counts all batches
                    own, position = turn * self.batch_size, batch * self.batch_size
                    yield [StreamIndex(self._item(bucket, own + i), position + i, self.seed) for i in self.indices]

    def _count_before(self, epoch: int) -> np.ndarray:
        """Return the number of batches of each bucket in the epochs before this one."""
        return epoch * self.sizes // self.batch_size

    def _order(self, epoch: int) -> Iterator[tuple[int, int]]:
        """Yield (bucket, number of batches that the bucket gave before) for each batch of the epoch, shuffled."""
        turns = self._count_before(epoch)
        order = np.repeat(np.arange(len(turns)), self._count_before(epoch + 1) - turns)
        for bucket in np.random.default_rng([self.seed, epoch, 0, 2]).permutation(order).tolist():
            yield bucket, int(turns[bucket])
            turns[bucket] += 1

    def _item(self, bucket: int, position: int) -> int:
        """Return the item at a position of the bucket's own endless stream, whose epochs are permutations."""
        epoch, offset = divmod(position, int(self.sizes[bucket]))
        known, order = self._orders.get(bucket, (-1, self.sizes))
        if known != epoch:
            order = np.random.default_rng([self.seed, epoch, bucket]).permutation(self.buckets[bucket])
            self._orders[bucket] = epoch, order
        return int(order[offset])


def _read_first(read: Callable[[Any], dict[str, Any]], candidates: Iterable[Any], warned: Tensor) -> dict[str, Any]:
    """Return the first candidate's item that can be read; warn about others once, and set `warned` for that."""
    errors = []
    for candidate in candidates:
        try:
            return read(candidate)
        except UnreadableItemError as error:
            errors.append(error)
            if not warned:
                warnings.warn(f"{error}; it is replaced by another (this is said once)", stacklevel=1)
                warned.fill_(True)
    raise ValueError(f"{len(errors)} items in a row cannot be read, the last: {errors[-1]}")


class FaultTolerantDataset(Dataset[dict[str, Any]]):
    """A dataset that replaces an unreadable item by the next readable one of its bucket, and warns once."""

    def __init__(self, data: ImageDataset, share: bool) -> None:
        self.data = data
        self._warned = torch.zeros(1, dtype=torch.bool)
        if share:  # with all workers
            self._warned.share_memory_()
        self._buckets = data.buckets or [np.arange(len(data))]

    def __getitem__(self, index: StreamIndex) -> dict[str, Any]:
        return _read_first(self.data.__getitem__, self._candidates(index), self._warned)

    def _candidates(self, index: StreamIndex) -> Iterator[StreamIndex]:
        yield index
        # of the same bucket, so that the batch keeps one size; at the same position, so that augmentation stays
        bucket = next(bucket for bucket in self._buckets if int(index) in bucket)
        start = int(np.searchsorted(bucket, int(index)))
        for i in range(start + 1, start + min(len(bucket), MAX_UNREADABLE_ITEMS)):
            yield StreamIndex(int(bucket[i % len(bucket)]), index.position, index.seed)


class StreamBatches(IterableDataset[list[dict[str, Any]]]):
    """Batches `start` to `stop` of a stream that begins again after each epoch; of each batch, one process's slice.

    The items before `start` are read without decoding. At most one worker process, which decodes in threads.
    """

    def __init__(
        self, data: StreamDataset, batch_size: int, seed: int, start: int, stop: int, part: slice, *, threads: int = 1
    ) -> None:
        self.data, self.batch_size, self.seed, self.threads = data, batch_size, seed, threads
        self.start, self.stop, self.indices = start, stop, range(batch_size)[part]
        self._warned = torch.zeros(1, dtype=torch.bool)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        endless = chain.from_iterable(self._read_epoch(epoch) for epoch in count())
        raw = islice(endless, self.start * self.batch_size, None)
        with ThreadPoolExecutor(self.threads) as pool:
            for step in range(self.start, self.stop):
                items, first = list(islice(raw, self.batch_size)), step * self.batch_size
                jobs = [pool.submit(self._decode, items, i, first + i) for i in self.indices]
                yield [job.result() for job in jobs]

    def _read_epoch(self, epoch: int) -> Iterator[Any]:
        empty = True
        for item in self.data.read_epoch(epoch, self.seed):
            empty = False
            yield item
        if empty:  # the stream would go on for ever without an item
            raise ValueError(f"the dataset has no items in epoch {epoch}")

    def _decode(self, items: list[Any], index: int, position: int) -> dict[str, Any]:
        """Decode item `index` of the batch, or the next readable one."""

        def decode(i: int) -> dict[str, Any]:
            return self.data.decode(items[i], StreamIndex(i, position, self.seed))

        return _read_first(decode, [*range(index, len(items)), *range(index)], self._warned)


class DataTimer:
    """Iterator over a loader that measures the share of time spent waiting for batches, and warns above `max_share`.

    The warning comes once and leaves out the first `warm_up` batches, in which the workers start.
    """

    max_share = 0.2

    def __init__(self, batches: Iterable[Any], warm_up: int = 20) -> None:
        self.batches, self.warm_up = batches, warm_up
        self.number, self._warned = 0, False
        self._waited = self._worked = 0.0  # seconds since the last call of `wait_share`
        self._total = [0.0, 0.0]  # seconds waited and worked since the warm-up

    def __iter__(self) -> Iterator[Any]:
        iterator, asked = iter(self.batches), time.perf_counter()
        for batch in iterator:
            given = time.perf_counter()
            yield batch
            returned = time.perf_counter()
            self._count(given - asked, returned - given)
            asked = returned

    def wait_share(self) -> float:
        """Return the share of the time since the last call that was spent waiting for data, in [0, 1]."""
        share = self._waited / (self._waited + self._worked or 1.0)
        self._waited = self._worked = 0.0
        return share

    def _count(self, waited: float, worked: float) -> None:
        self.number += 1
        self._waited, self._worked = self._waited + waited, self._worked + worked
        if self.number <= self.warm_up:
            return
        self._total = [self._total[0] + waited, self._total[1] + worked]
        share = self._total[0] / (sum(self._total) or 1.0)
        if self.number >= 2 * self.warm_up and share > self.max_share and not self._warned:
            self._warned = True
            remedies = "more num_workers, cache_images, or images that are already scaled to image_size would help"
            warnings.warn(f"training waits for data in {share:.0%} of the time; {remedies}", stacklevel=3)
