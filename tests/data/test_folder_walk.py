"""The walk through a folder: links, and warnings about what is not used."""

import os
import warnings

import numpy as np
import pytest
from PIL import Image

from support.data import write_image
from unet_denoiser import load_data
from unet_denoiser.data.sources.folder_walk import list_images, walk_folder

needs_links = pytest.mark.skipif(os.name != "posix", reason="Windows lets few users make links")


def make_images(folder, *names):
    for name in names:
        write_image(folder / name, np.zeros((8, 8)))
    return folder


def warnings_of(folder, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(folder, **options)
    return data, " | ".join(str(warning.message) for warning in caught)


@needs_links
@pytest.mark.parametrize("target", [".", "..", "../x", "../y"])
def test_a_link_to_a_folder_that_is_read_adds_nothing(tmp_path, target):
    """Also if it comes first: the real folder keeps its images."""
    folder = make_images(tmp_path / "d", "x/b.png", "y/a.png")
    (folder / "x" / "aloop").symlink_to(target)
    data, said = warnings_of(folder)
    assert (data.files, data.class_names) == (["x/b.png", "y/a.png"], ["x", "y"])
    assert "1 folder in" in said
    assert "x/aloop" in said


@needs_links
def test_links_are_followed_for_images_and_metadata(tmp_path):
    real = make_images(tmp_path / "real", "a.png", "b/b.png")
    (real / "b" / "metadata.csv").write_text("file_name,label\nb.png,dog\n../a.png,cat\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "first").symlink_to(real)
    (tmp_path / "d" / "second").symlink_to(real)
    data, said = warnings_of(tmp_path / "d")
    assert (data.files, data.class_names) == (["first/a.png", "first/b/b.png"], ["cat", "dog"])
    assert "not read again: 1 folder" in said


@needs_links
def test_links_that_lead_nowhere_are_named(tmp_path):
    folder = make_images(tmp_path / "d", "cats/a.png")
    (folder / "dogs").symlink_to(tmp_path / "unplugged")
    (folder / "self").symlink_to("self")
    data, said = warnings_of(folder)
    assert len(data) == 1
    assert f"2 in {folder}: dogs, self" in said
    (folder / "cats" / "b.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "cats" / "c.png")
    with pytest.raises(ValueError, match=r"2 of 3 images .* cats/b\.png is missing; cats/c\.png is a folder"):
        load_data(folder)


def test_hidden_folders_are_left_out(tmp_path):
    folder = make_images(tmp_path / ".d", "a.png", ".trash/b.png", "c/.b.png")
    (folder / ".trash" / "metadata.csv").write_text("file_name,label\nz.png,cat\n")
    (folder / "c" / ".metadata.csv").write_text("file_name,label\nz.png,cat\n")
    assert list_images(folder) == ["a.png"]
    assert walk_folder(folder).metadata == []


def test_files_of_unknown_suffix_are_counted(tmp_path):
    folder = make_images(tmp_path / "d", "cats/a.png")
    names = [f"dogs/{i}.HEIC" for i in range(3)] + ["cats/b.jxl", "cats/.DS_Store", "cats/Thumbs.db", "README", "x.txt"]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    Image.new("L", (8, 8)).save(folder / "cats" / "0001", "PNG")
    data, said = warnings_of(folder)
    assert len(data) == 1
    assert "has 3 .heic files, 1 .jxl file, 1 image without a suffix, which are not read" in said
    assert f"no classes are made of 1 sub-folder of {folder} without usable images: dogs" in said
    (folder / "cats" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no images were found in .*, only 3 \.heic files, 1 \.jxl file, 1 image"):
        load_data(folder)


def test_litter_is_left_out_without_a_word(tmp_path):
    folder = make_images(tmp_path / "d", "a.png")
    for name in ("README.md", "LICENSE", "desktop.ini", "notes.txt", "Thumbs.db", "classification.json", "photos.zip"):
        (folder / name).write_text("x")
    assert warnings_of(folder)[1] == ""


@pytest.mark.parametrize(
    "name",
    [
        *("metadata.json", "metadata.json1", "metadata.tsv", "metadata.parquet", "metadata.csv.txt", "Metadata.xlsx"),
        *("labels.csv", "captions.txt", "train.csv", "sub/image_labels.json", "classes.txt", "_annotations.coco.json"),
    ],
)
def test_files_that_look_like_metadata_are_named(tmp_path, name):
    folder = make_images(tmp_path / "d", "a.png", "sub/b.png")
    (folder / name).write_text("a.png,cat\n")
    assert f"may hold labels or captions and are not read: {name}" in warnings_of(folder)[1]


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_captions_beside_images_are_named(tmp_path, suffix):
    folder = make_images(tmp_path / "d", "a.png", "b.png")
    (folder / f"a{suffix}").write_text("a cat")
    (folder / f"b.png{suffix}").write_text("a dog")
    assert f"2 files beside images of {folder} may hold captions" in warnings_of(folder)[1]
    (folder / "metadata.csv").write_text("file_name,text\na.png,a cat\nb.png,a dog\n")
    assert warnings_of(folder)[1] == ""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/cat/a.png", "val/cat/b.png"], r"the sub-folders train, val of .* give .*train to read that one"),
        (["Training/a.png", "TEST/b.png"], r"the sub-folders TEST, Training of .* give .*Training to"),
        (["test2017/a.png", "val2017/b.png", "c/c.png"], r"the sub-folders test2017, val2017 of"),
        (["train/a.png"], r"the sub-folders train of .* as its classes"),
        (["pets/cat/a.png", "pets/dog/b.png"], r"one class 'pets', .*\(cat, dog\); give .*pets to"),
        (["cat/a.png", "dog/b.png"], ""),
        (["train/a.png", "car/b.png"], ""),  # a vehicle
        (["cat/old/a.png", "dog/b.png"], ""),
    ],
)
def test_splits_and_wrapped_classes_are_said(tmp_path, names, message):
    import re

    said = warnings_of(make_images(tmp_path / "d", *names))[1]
    assert re.search(message, said) if message else said == ""


def test_classes_of_similar_names_are_said(tmp_path):
    folder = make_images(tmp_path / "d", "Cat/a.png", "cat/b.png", "cafe\u0301/c.png", "caf\xe9/d.png", "dog/e.png")
    data, said = warnings_of(folder)
    if len(data.class_names) == 5:  # the file system keeps them apart
        assert "classes of their own: 'Cat' and 'cat', 'cafe\u0301' and 'caf\xe9'" in said


@pytest.mark.skipif(os.name != "posix", reason="only there a file's name may be any bytes")
def test_refuses_folders_whose_names_are_no_utf_8(tmp_path):
    folder = make_images(tmp_path / "d", "a/b.png")
    (folder / "a").rename(folder / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"sub-folder of .*/d is no UTF-8: caf\\xe9; rename it"):
        load_data(folder)
    folder.rename(tmp_path / os.fsdecode(b"\xe9"))
    with pytest.raises(ValueError, match=r"the folder is no UTF-8: .*\\xe9; rename it"):
        load_data(tmp_path / os.fsdecode(b"\xe9"))
