"""Data sets: arrays, folders, the digits; the endless order; and every refusal."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.testing import assert_close

from unet_denoiser import ArrayData, FolderData, load_data
from unet_denoiser.data import EndlessBatches, digits


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path)


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
    data = ArrayData(checkers, image_size=4)
    assert data.image_size == (4, 4)
    assert_close(data[0]["image"], torch.zeros(1, 4, 4), atol=0.02, rtol=0)  # without it: all black or all white
    assert ArrayData(checkers, image_size=(8, 4)).image_size == (8, 4)


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


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_folder_with_classes_of_mixed_modes(tmp_path):
    """Sub-folders are classes, whatever they are called; grey, palette, alpha and 16 bits all become RGB."""
    write(tmp_path / "d" / "train" / "red.png", np.full((8, 8, 3), (255, 0, 0)))
    write(tmp_path / "d" / "test" / "grey.png", np.full((8, 8), 51))
    half = np.zeros((8, 8, 4))
    half[:4] = (0, 0, 255, 255)  # the lower half is transparent black: white once it is laid on white
    write(tmp_path / "d" / "Ünïcode name" / "alpha.png", half)
    deep = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    deep.save(tmp_path / "d" / "test" / "deep.png")
    data = load_data(tmp_path / "d")
    assert data.class_names == ["test", "train", "Ünïcode name"]
    assert (len(data), data.channels, data.image_size) == (4, 3, (8, 8))
    found = {(data.class_names[item["class_labels"]], *item["image"].mean((1, 2)).tolist()) for item in data}
    rounded = {(name, *(round(v, 2) for v in values)) for name, *values in found}
    assert rounded == {
        ("train", 1.0, -1.0, -1.0),
        ("test", -0.6, -0.6, -0.6),
        ("test", 1.0, 1.0, 1.0),
        ("Ünïcode name", 0.0, 0.0, 1.0),
    }
    assert_close(pickle.loads(pickle.dumps(data))[0]["image"], data[0]["image"])  # for spawned workers


def test_folders_of_any_name(tmp_path):
    """Names that a pattern would take for its own signs."""
    folder = tmp_path / "my [set] *1"
    write(folder / "a b" / "1 [x].png", np.zeros((4, 4)))
    write(folder / "?" / "2.png", np.zeros((4, 4)))
    data = load_data(folder)
    assert (len(data), data.class_names) == (2, ["?", "a b"])


def test_flat_folder_has_no_classes(tmp_path):
    for i in range(3):
        write(tmp_path / "d" / f"{i}.png", np.full((6, 9), 10 * i))
    data = FolderData(tmp_path / "d")
    assert (data.class_names, data.labels, data.channels, data.image_size) == (None, None, 1, (6, 9))
    assert set(data[0]) == {"image"}
    assert data[0]["image"].shape == (1, 6, 9)


def test_sizes(tmp_path):
    """Large or differing images go to 64 by default; any size is fitted at the centre, without distortion."""
    wide = np.zeros((50, 150, 3))
    wide[:, 50:100] = 255  # a white square in the middle
    write(tmp_path / "d" / "wide.png", wide)
    data = FolderData(tmp_path / "d")
    assert data.image_size == (64, 64)
    assert data[0]["image"].mean() > 0.9
    write(tmp_path / "d" / "other.png", np.zeros((9, 70, 3)))
    write(tmp_path / "d" / "small.png", np.zeros((8, 8, 3)))
    assert FolderData(tmp_path / "d").image_size == (64, 64)
    for i in range(2):
        write(tmp_path / "d" / f"small{i}.png", np.zeros((8, 8, 3)))
    assert FolderData(tmp_path / "d").image_size == (8, 8)  # that of at least half
    data = FolderData(tmp_path / "d", image_size=(4, 12))
    assert (data.image_size, data[0]["image"].shape) == ((4, 12), (3, 4, 12))


@pytest.mark.parametrize(("channels", "expected"), [(1, 0.302), (3, 1.0), (4, 1.0)])
def test_one_number_sets_the_channels(tmp_path, channels, expected):
    write(tmp_path / "d" / "a.png", np.full((4, 4, 4), (255, 0, 0, 255)))
    data = load_data(tmp_path / "d", channels=channels)
    assert data[0]["image"].shape == (channels, 4, 4)
    luma = (expected * 127.5 + 127.5 if channels > 1 else 76) / 127.5 - 1  # ITU-R 601: 0.299 of red
    assert data[0]["image"][0].mean().item() == pytest.approx(luma, abs=0.01)


def test_refuses_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images were found in .*empty"):
        load_data(tmp_path / "empty")
    write(tmp_path / "d" / "fine.png", np.zeros((4, 4)))
    (tmp_path / "d" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        load_data(tmp_path / "d")
    (tmp_path / "d" / "broken.png").unlink()
    with pytest.raises(ValueError, match="in_channels=2"):
        load_data(tmp_path / "d", channels=2)
    with pytest.raises(ValueError, match="image_size"):
        load_data(tmp_path / "d", image_size=(4, 4, 4))


def test_truncated_image_is_named(tmp_path):
    write(tmp_path / "d" / "a.png", np.random.default_rng(0).integers(0, 255, (32, 32, 3)))
    data = load_data(tmp_path / "d")
    content = (tmp_path / "d" / "a.png").read_bytes()
    (tmp_path / "d" / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        data[0]


# ---- order -----------------------------------------------------------------------------------------------------------


def order(*args, **options):
    return [place.item for batch in EndlessBatches(*args, **options) for place in batch]


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
    parts = [list(EndlessBatches(7, 4, 3, 0, 5, 2, process)) for process in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    with pytest.raises(ValueError, match="batch_size=4 must be a multiple of the 3 processes"):
        EndlessBatches(7, 4, 3, 0, 5, 3)
