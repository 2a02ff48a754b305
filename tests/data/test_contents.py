"""Digests of data: what changes them, and what does not."""

import shutil

import numpy as np
import pytest
from PIL import Image

from unet_denoiser import load_data
from unet_denoiser.data.contents import describe_changes, describe_contents


def write(path, size=(8, 8), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        write(tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png", seed=i)
    return tmp_path / "pictures"


def changes_after(folder, change):
    before = describe_contents(load_data(folder, image_size=8))
    change()
    return describe_changes(before, describe_contents(load_data(folder, image_size=8)))


def test_data_that_only_moved_have_not_changed(folder, tmp_path):
    before = describe_contents(load_data(folder))
    shutil.copytree(folder, tmp_path / "moved")  # with other times
    assert describe_changes(before, describe_contents(load_data(tmp_path / "moved"))) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: write(f / "a" / "9.png"), "5 images, 4 before, other names or another order of the images"),
        (lambda f: (f / "a" / "0.png").unlink(), "3 images, 4 before"),
        (lambda f: (f / "a" / "0.png").rename(f / "a" / "8.png"), "other names or another order"),
        (lambda f: write(f / "a" / "0.png", (14, 14)), "other images"),
        (lambda f: (f / "a" / "0.png").rename(f / "b" / "0.png"), "other labels"),
    ],
)
def test_changes_of_a_folder_are_told(folder, change, words):
    assert words in changes_after(folder, lambda: change(folder))


def test_changes_of_captions_are_told(folder):
    metadata = folder / "metadata.csv"
    metadata.write_text("file_name,text\na/0.png,one\nb/1.png,two\n")
    assert changes_after(folder, lambda: metadata.write_text("file_name,text\na/0.png,one\nb/1.png,2\n")) == (
        "other captions"
    )


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_changes_of_arrays_are_told(tmp_path, suffix):
    images, path = np.zeros((6, 8, 8), np.uint8), tmp_path / f"x.{suffix}"

    def save():
        np.savez(path, images=images) if suffix == "npz" else np.save(path, images)

    def change():
        images[3, 4, 5] = 1
        save()

    save()
    assert changes_after(path, change) == "other images"


def test_old_checkpoints_tell_nothing(folder):
    assert describe_changes({}, describe_contents(load_data(folder))) is None
