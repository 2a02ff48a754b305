"""Arrays in .npz and .npy files, and scikit-learn's digits."""

import io
import pickle
import zipfile
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
        UserWarning, match="3 of its 10 classes, none of 0, 1, 2, 3, 4, and 2 more; its labels begin at 7"
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
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, r"labels of .*d\.npz have shape \(3,\)"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.array([0, -1])}, "integers from 0"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.array([0.0, 1.0])}, "integers from 0"),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, r"as \(N, C, H, W\) has; give \(N, H, W, C\)"),
        ({"images": np.zeros((2, 1, 28, 28), np.uint8)}, r"as \(N, C, H, W\) has"),
        ({"images": np.full((2, 4, 4), 200.0)}, r"d\.npz go from 200 to 200; .* or images / 127\.5 - 1"),
        ({"images": np.full((2, 4, 4), 200)}, r"dtype int64; .* for example images\.astype\(np\.uint8\)$"),
        ({"images": np.ones((2, 4, 4), bool)}, r"dtype bool; .* for example images\.astype\(np\.uint8\) \* 255"),
        ({"images": np.zeros((2, 4, 4), complex)}, r"d\.npz have dtype complex128"),
        ({"images": np.zeros((2, 4, 4), [("r", "u1")])}, "give uint8"),
        (
            {"images": np.zeros((2, 4, 4)), "captions": np.array(["a", ""])},
            "no 'caption' in 1 of 2 rows",
        ),
        ({"images": np.zeros((2, 4, 4)), "captions": np.array([b"a", b"b"])}, "in item 0, of type bytes_; give text"),
        ({"images": np.zeros((2, 4, 4)), "captions": np.array(["a"])}, "there are 1 captions for 2 images"),
        ({"images": np.zeros((2, 4, 4)), "vectors": np.zeros(2)}, r"vectors of .*d\.npz have shape \(2,\)"),
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


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.linspace(0, 1, 32), r"d\.np. go from 0 to 1, and black is -1; if 0 is black, give images \* 2 - 1"),
        (np.arange(32).astype(np.uint8) % 2, r"from 0 to 1 of 0 to 255, so they are nearly black; images \* 255"),
        (np.arange(32).astype(np.uint16) * 8, "from 0 to 248 of 0 to 65535, so they are nearly black; scale them"),
    ],
)
def test_warns_of_ranges_that_are_used_in_part(tmp_path, images, message):
    images = images.reshape(2, 4, 4)
    np.savez(tmp_path / "d.npz", images=images)
    np.save(tmp_path / "d.npy", images)
    for name in ("d.npz", "d.npy"):
        with pytest.warns(UserWarning, match=message):
            load_data(tmp_path / name)


def test_warns_of_shapes_that_look_like_others(tmp_path):
    for shape in ((9, 3, 100), (64, 64, 3)):
        np.save(tmp_path / "d.npy", np.zeros(shape, np.uint8))
        with pytest.warns(UserWarning, match=r"d\.npy has shape .* is read as .* grey images"):
            load_data(tmp_path / "d.npy")
    with pytest.warns(UserWarning, match=r"as \(N, H, W, C\) has, and are read as \(N, C, H, W\)"):
        ArrayDataset(np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("dtype", [">u2", ">f4", ">f8", "<f2", np.longdouble])
def test_any_order_of_bytes_and_axes(tmp_path, dtype):
    images = np.asfortranarray(np.linspace(-1, 1, 2 * 6 * 5 * 2).reshape(2, 6, 5, 2))
    if dtype == ">u2":
        images = ((images + 1) * 32767.5).round()
    np.save(tmp_path / "d.npy", images.astype(dtype))
    np.savez(tmp_path / "d.npz", images=images.astype(dtype), labels=np.array([1, 0], ">i4"))
    expected = torch.from_numpy(images[1] / 32767.5 - 1 if dtype == ">u2" else images[1]).permute(2, 0, 1).float()
    for name in ("d.npy", "d.npz"):
        assert_close(load_data(tmp_path / name)[1]["image"], expected, atol=1e-3, rtol=0)
    assert load_data(tmp_path / "d.npz").labels.tolist() == [1, 0]


def test_labels_of_npz_may_be_names(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array(["b", "a"]))
    data = load_data(tmp_path / "d.npz")
    assert (data.class_names, data.labels.tolist()) == (["a", "b"], [1, 0])
    assert data.origins == {"class_labels": "array labels"}


# ---- hostile and damaged files ---------------------------------------------------------------------------------------


def write_npz(path, compression=zipfile.ZIP_STORED, **contents):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in contents.items():
            file.writestr(f"{name}.npy", content)
    return path


def npy(array, shape=None):
    """The content of an .npy file, whose header may claim another shape."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + array.tobytes()


def test_headers_that_claim_more_than_there_is(tmp_path):
    for shape in ((2**20, 2**10, 2**10), (2**40, 2**40, 2**40), (-1, 4, 4)):
        content = npy(np.zeros((1, 4, 4), np.uint8), shape)
        (tmp_path / "d.npy").write_bytes(content)
        for path in (write_npz(tmp_path / "d.npz", images=content), tmp_path / "d.npy"):
            with pytest.raises(ValueError, match=rf"{path.name} is not a readable"):
                load_data(path)


def test_bombs_are_not_decompressed(tmp_path, monkeypatch):
    """Of an array that is not used nothing is read; one that is used is judged by its size first."""
    images = npy(np.zeros((1, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "unused.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images.npy", images)
        file.writestr("junk.npy", b"no array at all")
    assert len(load_data(tmp_path / "unused.npz")) == 1
    monkeypatch.setattr("unet_denoiser.data.sources.arrays.MAX_UNCHECKED_SIZE", 2**22)
    bomb = npy(np.zeros((2**19, 4, 4), np.uint8))
    write_npz(tmp_path / "bomb.npz", zipfile.ZIP_DEFLATED, images=bomb)
    with pytest.raises(ValueError, match=r"bomb\.npz is not a readable .* expands from 0 MiB to 8 MiB"):
        load_data(tmp_path / "bomb.npz")


def test_damaged_and_encrypted_files(tmp_path):
    content = bytearray(write_npz(tmp_path / "d.npz", images=npy(np.zeros((2, 4, 4), np.uint8))).read_bytes())
    encrypted = content.copy()
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[content.index(signature) + offset] |= 1
    unknown = content.copy()
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        unknown[content.index(signature) + offset] = 77
    flipped = content.copy()
    flipped[content.index(b"PK\x01\x02") - 1] ^= 1  # the last pixel
    for damaged in (encrypted, unknown, flipped, content[:-30], b""):
        (tmp_path / "d.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"d\.npz is not a readable \.npz file"):
            load_data(tmp_path / "d.npz")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"d\.npy is not a readable \.npy file"):
        load_data(tmp_path / "d.npy")
