"""The endless order of batches, the loader, its replacement of unreadable items, and its timer."""

import os
import signal
import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.data import assert_same, load_batches, write_image
from unet_denoiser import ArrayDataset, DataConfig, load_data
from unet_denoiser.data.dataloader import DataTimer, EndlessBatches, make_loader, process_slice
from unet_denoiser.data.transforms import UnreadableItemError


def read_order(*args, **options):
    return [int(place) for batch in EndlessBatches(*args, **options) for place in batch]


def test_each_epoch_is_a_new_permutation_without_gaps():
    stream = read_order(7, 3, seed=3, start=0, stop=7)
    epochs = [stream[0:7], stream[7:14], stream[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert read_order(7, 3, seed=4, start=0, stop=7) != stream


@pytest.mark.parametrize("start", [0, 1, 2, 3, 6])
def test_order_can_start_at_any_batch(start):
    batches = list(EndlessBatches(7, 3, seed=3, start=0, stop=7))
    rest = EndlessBatches(7, 3, seed=3, start=start, stop=7)
    assert list(rest) == batches[start:]
    assert len(rest) == 7 - start


def test_processes_share_every_batch():
    whole = list(EndlessBatches(7, 4, 3, 0, 5))
    parts = [list(EndlessBatches(7, 4, 3, 0, 5, process_slice(4, 2, process))) for process in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        process_slice(4, 3, 0)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 9), st.integers(0, 30))
def test_buckets_are_sampled_in_proportion(sizes, batch_size, seed, start):
    """One bucket per batch, each item once per epoch of its bucket, buckets in proportion, and any start."""
    starts = np.cumsum([0, *sizes])
    buckets = [np.arange(a, b) for a, b in pairwise(starts)]
    total, stop = sum(sizes), 40
    batches = list(EndlessBatches(buckets, batch_size, seed, 0, stop))
    assert [len(batch) for batch in batches] == [batch_size] * stop
    assert [place.position for batch in batches for place in batch] == list(range(stop * batch_size))
    of = np.repeat(np.arange(len(sizes)), sizes)
    assert all(len({of[place] for place in batch}) == 1 for batch in batches)
    for b, size in enumerate(sizes):
        seen = [int(place) for batch in batches for place in batch if of[place] == b]
        assert all(sorted(seen[i : i + size]) == buckets[b].tolist() for i in range(0, len(seen) - size + 1, size))
        assert abs(len(seen) - stop * batch_size * size / total) <= 2 * batch_size * len(sizes) + size
    rest = list(EndlessBatches(buckets, batch_size, seed, start, stop))
    assert [list(map(int, b)) for b in rest] == [list(map(int, b)) for b in batches[start:]]


def test_an_epoch_of_buckets_has_each_item_once():
    buckets = [np.arange(6), np.arange(6, 18)]
    epochs = np.array(read_order(buckets, 3, seed=1, start=0, stop=60)).reshape(10, 18)
    assert [sorted(epoch) for epoch in epochs] == [list(range(18))] * 10
    small = epochs[:, ::3] < 6  # which batches are of the first bucket
    assert (small.sum(1) == 2).all()
    assert len(np.unique(small, axis=0)) > 3  # mixed, not one bucket after the other


def augmented_dataset():
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 8, 12), np.uint8)
    config = DataConfig("arrays", resize_mode="random_crop", horizontal_flip=True)
    return ArrayDataset(images, np.arange(10) % 3, image_size=8, config=config)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_batches_do_not_depend_on_workers_or_start(options):
    straight = load_batches(augmented_dataset())
    assert_same(load_batches(augmented_dataset(), start=2, **options), straight[2:])
    images = {tuple(batch["image"].flatten().tolist()) for batch in straight}
    assert len(images) == 6


def test_processes_load_slices_of_the_batches():
    parts = [load_batches(augmented_dataset(), num_processes=2, process_index=i) for i in range(2)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, load_batches(augmented_dataset()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_replaced(tmp_path, workers):
    """By the next one, the same on every machine; an access by index raises the reason."""
    for i in range(4):
        write_image(tmp_path / "d" / f"{i}.png", np.full((8, 8), 50 * i))
    data = load_data(tmp_path / "d")
    (tmp_path / "d" / "1.png").write_bytes(b"broken")
    (tmp_path / "d" / "2.png").unlink()
    with pytest.raises(UnreadableItemError, match=r"1\.png cannot be read"):
        data[1]
    loader = make_loader(data, 4, seed=0, start=0, stop=3, num_workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = sorted((batch["image"].mean((1, 2, 3)) * 127.5 + 127.5).round().tolist() for batch in loader)
    assert [sorted(batch) for batch in values] == [[0, 150, 150, 150]] * 3
    assert workers or sum("is replaced by another" in str(w.message) for w in caught) == 1
    for i in range(4):
        (tmp_path / "d" / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="4 items in a row cannot be read"):
        list(make_loader(data, 4, seed=0, start=0, stop=1, num_workers=0))


def test_timer_warns_once_about_waiting():
    def slow():
        for i in range(12):
            time.sleep(0.004)
            yield i

    timer = DataTimer(slow(), warm_up=3)
    with pytest.warns(UserWarning, match=r"waits for data in \d+% .* num_workers") as caught:
        assert list(timer) == list(range(12))
    assert len(caught) == 1
    assert timer.wait_share() > 0.9
    quick = DataTimer(range(12), warm_up=3)
    for _ in quick:
        time.sleep(0.002)
    assert quick.wait_share() < 0.1


def test_refuses_a_bucket_of_one_unreadable_item(tmp_path):
    path = write_image(tmp_path / "d" / "0.png", np.zeros((8, 8)))
    data = load_data(tmp_path / "d")
    path.write_bytes(b"broken")
    with (
        pytest.warns(UserWarning, match="replaced"),
        pytest.raises(ValueError, match="1 items in a row cannot be read"),
    ):
        list(make_loader(data, 1, seed=0, start=0, stop=1, num_workers=0))


class Failing(ArrayDataset):
    """A dataset whose items cannot be read in workers."""

    def __init__(self, error):
        super().__init__(np.zeros((8, 1, 4, 4), np.uint8))
        self.error = error

    def __getitem__(self, index):
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RuntimeError("unable to allocate shared memory(shm)"),
            OSError,
            r"/dev/shm is full.* --num-workers 0.*--shm-size",
        ),
        (ValueError("item 3 is bad"), ValueError, "^item 3 is bad$"),
        (None, OSError, r"DataLoader worker \(pid.*num_workers"),
    ],
)
def test_errors_in_workers_are_one_line(error, kind, message):
    begun = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        list(make_loader(Failing(error), 4, seed=0, start=0, stop=2, num_workers=2))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 5
