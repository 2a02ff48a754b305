"""Arrays in .npz and .npy files, and scikit-learn's digits."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.testing import assert_close

from unet_denoiser import ArrayDataset, load_data
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.sources.arrays import digits


def test_digits_are_split_into_training_and_held_out():
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


def test_uint8_is_scaled_to_minus_one_to_one(tmp_path):
    images = np.array([[[0, 255], [51, 204]]], np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    data = load_data(tmp_path / "d.npz")
    assert_close(data[0]["image"], torch.tensor([[[-1, 1], [-0.6, 0.6]]]))
    assert data.class_names is None
    assert set(data[0]) == {"image"}


def test_npz_with_channels_labels_and_class_names(tmp_path):
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


def test_uint16_and_mapped_npy_files(tmp_path):
    """A mapped file of 7 channels of uint16, also sent to another process."""
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


def test_labels_with_large_gaps(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "years.npz", images=images, labels=[7, 8, 9, 9])
    with pytest.warns(
        UserWarning, match="3 of its 10 classes, none of 0, 1, 2, 3, 4 and 2 more; its labels begin at 7"
    ):
        load_data(tmp_path / "years.npz")
    np.savez(tmp_path / "ids.npz", images=images, labels=[7, 8, 9, 10**8])
    with pytest.raises(ValueError, match="go up to 100000000 in item 3; give names, or integers from 0 without gaps"):
        load_data(tmp_path / "ids.npz")


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
