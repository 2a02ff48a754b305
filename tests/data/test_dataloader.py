"""Data sets: arrays, the digits, one's own; the endless order and its loader; and every refusal."""

import pickle
import random
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.testing import assert_close

from unet_denoiser import ArrayDataset, DataConfig, load_data
from unet_denoiser.data.dataloader import DataTimer, EndlessBatches, make_loader
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.sources.arrays import digits
from unet_denoiser.data.sources.custom import as_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_digits_are_sklearns_split_in_two():
    (seen, seen_labels), (held_out, held_out_labels) = digits(), digits(held_out=True)
    assert (len(seen), len(held_out)) == (1438, 359)
    original = load_digits()
    assert Counter(seen_labels) + Counter(held_out_labels) == Counter(original.target)
    pixels = np.concatenate([seen, held_out])[:, 0] * 8 + 8
    assert sorted(map(bytes, pixels.astype(np.uint8))) == sorted(map(bytes, original.images.astype(np.uint8)))
    data = load_data("digits")
    assert (data.channels, data.image_size, data.class_names) == (1, (8, 8), [str(i) for i in range(10)])
    assert data[0]["image"].dtype == torch.float32
    assert data[7]["class_labels"] == seen_labels[7]


def test_uint8_arrays_become_minus_one_to_one(tmp_path):
    images = np.array([[[0, 255], [51, 204]]], np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    data = load_data(tmp_path / "d.npz")
    assert_close(data[0]["image"], torch.tensor([[[-1, 1], [-0.6, 0.6]]]))
    assert data.class_names is None
    assert set(data[0]) == {"image"}


def test_channels_last_labels_and_names(tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 6, 5, 2)).astype(np.float32)
    np.savez(tmp_path / "d.npz", images=images, labels=np.array([0, 2, 1, 2]), class_names=np.array(["a", "b", "ç"]))
    data = load_data(tmp_path / "d.npz")
    assert (data.channels, data.image_size, data.class_names) == (2, (6, 5), ["a", "b", "ç"])
    assert_close(data[3]["image"], torch.from_numpy(images[3]).permute(2, 0, 1))
    assert data[3]["class_labels"] == 2


def test_arrays_are_resized_with_antialiasing():
    checkers = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)[None, None]
    data = ArrayDataset(checkers, image_size=4)
    assert data.image_size == (4, 4)
    assert_close(data[0]["image"], torch.zeros(1, 4, 4), atol=0.02, rtol=0)  # without it: all black or all white
    assert ArrayDataset(checkers, image_size=(8, 4)).image_size == (8, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "no array 'images'; it has pictures"),
        ({"images": np.zeros((2, 4), np.uint8)}, r"shape \(2, 4\); give \(N, H, W\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "dtype int64; give uint8"),
        ({"images": np.full((2, 4, 4), 1.5)}, r"go from 1.5 to 1.5; floats must be in \[-1, 1\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, r"floats must be in \[-1, 1\]"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, r"labels have shape \(3,\)"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.array([0, -1])}, "integers from 0"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.array([0.0, 1.0])}, "integers from 0"),
        (
            {"images": np.zeros((2, 4, 4)), "labels": np.array([0, 3]), "class_names": np.array(["a", "b"])},
            "class_names has 2 entries, labels go up to 3",
        ),
    ],
)
def test_refuses_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises((ValueError, TypeError), match=message):
        load_data(tmp_path / "d.npz")


def test_refuses_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"DATA=nowhere is not 'digits'"):
        load_data("nowhere")
    (tmp_path / "broken.npz").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match=r"broken\.npz is not a readable"):
        load_data(tmp_path / "broken.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{"code": 1}], object))
    with pytest.raises(ValueError, match=r"pickled\.npz is not a readable"):
        load_data(tmp_path / "pickled.npz")


# ---- order -----------------------------------------------------------------------------------------------------------


def order(*args, **options):
    return [int(place) for batch in EndlessBatches(*args, **options) for place in batch]


def test_each_epoch_is_a_new_permutation_without_gaps():
    stream = order(7, 3, seed=3, start=0, stop=7)
    epochs = [stream[0:7], stream[7:14], stream[14:21]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order(7, 3, seed=4, start=0, stop=7) != stream


@pytest.mark.parametrize("start", [0, 1, 2, 3, 6])
def test_goes_on_anywhere(start):
    batches = list(EndlessBatches(7, 3, seed=3, start=0, stop=7))
    rest = EndlessBatches(7, 3, seed=3, start=start, stop=7)
    assert list(rest) == batches[start:]
    assert len(rest) == 7 - start


def test_processes_share_every_batch():
    whole = list(EndlessBatches(7, 4, 3, 0, 5))
    parts = [list(EndlessBatches(7, 4, 3, 0, 5, num_processes=2, process_index=process)) for process in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        EndlessBatches(7, 4, 3, 0, 5, num_processes=3)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 9), st.integers(0, 30))
def test_buckets_share_the_stream(sizes, batch_size, seed, start):
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
    epochs = np.array(order(buckets, 3, seed=1, start=0, stop=60)).reshape(10, 18)
    assert [sorted(epoch) for epoch in epochs] == [list(range(18))] * 10
    small = epochs[:, ::3] < 6  # which batches are of the first bucket
    assert (small.sum(1) == 2).all()
    assert len(np.unique(small, axis=0)) > 3  # mixed, not one bucket after the other


# ---- loader ----------------------------------------------------------------------------------------------------------


def augmented():
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 8, 12), np.uint8)
    config = DataConfig("arrays", resize_mode="random_crop", horizontal_flip=True)
    return ArrayDataset(images, np.arange(10) % 3, image_size=8, config=config)


def batches_of(data, start=0, stop=6, **options):
    return list(make_loader(data, 4, seed=3, start=start, stop=stop, **{"num_workers": 0} | options))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[key], y[key]) for key in x)


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "multiprocessing_context": "spawn"}])
def test_batches_do_not_depend_on_workers_nor_on_the_start(options):
    straight = batches_of(augmented())
    assert_same(batches_of(augmented(), start=2, **options), straight[2:])
    images = {tuple(batch["image"].flatten().tolist()) for batch in straight}
    assert len(images) == 6


def test_batches_of_processes_are_parts_of_the_whole():
    parts = [batches_of(augmented(), num_processes=2, process_index=i) for i in range(2)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*parts, strict=True)]
    assert_same(joined, batches_of(augmented()))


def test_array_files_of_any_kind(tmp_path):
    """uint16 and mapped .npy of many channels, also in another process."""
    images = np.random.default_rng(0).integers(0, 2**16, (5, 6, 4, 7), np.uint16)
    np.save(tmp_path / "d.npy", images)
    data = load_data(tmp_path / "d.npy", horizontal_flip=True)
    assert (data.channels, data.image_size, len(data)) == (7, (6, 4), 5)
    expected = torch.from_numpy(images[3].astype(np.float32)).permute(2, 0, 1) / 32767.5 - 1
    assert_close(data[3]["image"], expected)
    assert len(pickle.dumps(data)) < 3000  # not the images
    assert torch.equal(pickle.loads(pickle.dumps(data))[3]["image"], data[3]["image"])
    assert {torch.equal(data[StreamIndex(3, i, 0)]["image"], data[3]["image"]) for i in range(20)} == {True, False}
    assert load_data(tmp_path / "d.npy", image_size=3)[0]["image"].shape == (7, 3, 3)
    np.savez(tmp_path / "d.npz", images=images, captions=["a", "b", "c", "d", "ë"], vectors=np.eye(5, 2))
    data = load_data(tmp_path / "d.npz")
    assert (data[4]["caption"], data[1]["vector"].tolist(), data.vector_dim) == ("ë", [0.0, 1.0], 2)
    with pytest.raises(ValueError, match="channels=3, but the arrays have 7"):
        load_data(tmp_path / "d.npy", channels=3)
    with pytest.raises(ValueError, match="aspect_buckets=True means nothing for arrays"):
        load_data(tmp_path / "d.npy", aspect_buckets=True)
    np.save(tmp_path / "wrong.npy", np.full((3, 4, 4), 2.0))
    with pytest.raises(ValueError, match=r"go from 2 to 2; floats must be in"):
        load_data(tmp_path / "wrong.npy")


def test_the_timer_warns_once_of_waiting():
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


# ---- one's own -------------------------------------------------------------------------------------------------------


class Own(torch.utils.data.Dataset):
    """Its own augmentation draws from all three global generators."""

    class_names = ("a", "b")

    def __len__(self):
        return 7

    def __getitem__(self, index):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return {"image": np.full((2, 4, 6), index / 7, np.float32) * float(noise) / 3, "class_labels": index % 2}


class OwnStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ({"image": torch.full((1, 4, 4), i / 10)} for i in range(10))


def test_own_data_sets_are_read_as_they_are():
    data = as_dataset(Own())
    assert (data.channels, data.image_size, data.class_names) == (2, (4, 6), ["a", "b"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(data[StreamIndex(3, 8, 0)]["image"], data[StreamIndex(3, 8, 0)]["image"])
    assert not torch.equal(data[StreamIndex(3, 8, 0)]["image"], data[StreamIndex(3, 9, 0)]["image"])
    assert torch.equal(torch.get_rng_state(), before)
    straight = batches_of(data)
    assert_same(batches_of(data, start=3, num_workers=2), straight[3:])
    assert straight[0]["image"].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_own_streams_go_on_exactly(workers):
    data = as_dataset(OwnStream())
    straight = batches_of(data)
    values = torch.cat([batch["image"][:, 0, 0, 0] for batch in straight])
    assert_close(values, torch.arange(24) % 10 / 10)
    assert_same(batches_of(data, start=4, num_workers=workers), straight[4:])
    parts = [batches_of(data, num_processes=2, process_index=i) for i in range(2)]
    assert_same([{"image": torch.cat([a["image"], b["image"]])} for a, b in zip(*parts, strict=True)], straight)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "data is a int; give a dataset"),
        ([], ValueError, "no items"),
        ([torch.zeros(1, 4, 4)], ValueError, "item 0 of the dataset is a Tensor; give dicts with 'image'"),
        ([{"pixels": 1}], ValueError, "item 0 of the dataset has the keys pixels"),
        ([{"image": np.zeros((4, 4, 3), np.uint8)}], ValueError, r"'image' in item 0 is torch.uint8 \(4, 4, 3\)"),
        ([{"image": "a.png"}], ValueError, "'image' in item 0 is str; give a tensor"),
    ],
)
def test_refuses_own_data(data, error, message):
    with pytest.raises(error, match=message):
        as_dataset(data)


def test_refuses_items_of_differing_shapes():
    data = as_dataset([{"image": torch.zeros(1, 4, 4)}, {"image": torch.zeros(1, 4, 5)}])
    with pytest.raises(ValueError, match=r"item 1 has shape \(1, 4, 5\), but the first one has \(1, 4, 4\)"):
        batches_of(data)
