"""Folders of images: classes, metadata, sizes and options."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from support.data import write_image
from unet_denoiser import DataConfig, ImageFolder, load_data
from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.data.dataset import StreamIndex


def test_classes_are_the_first_sub_folders(tmp_path):
    """Of any name, with files at any depth; other files are ignored."""
    for name in ("train/a.png", "Ünïcode ✓/deep/er/b.JPG", "test/c.webp"):
        write_image(tmp_path / "d" / name, np.zeros((8, 8)))
    for name in ("Thumbs.db", "train/.DS_Store", "test/notes.txt", "test/._c.webp", ".hidden/x.png"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"no image")
    data = load_data(tmp_path / "d")
    assert (len(data), data.class_names) == (3, ["test", "train", "Ünïcode ✓"])
    assert data.labels.tolist() == [0, 1, 2]
    chosen = load_data(tmp_path / "d", class_names=("Ünïcode ✓", "none", "train", "test"))
    assert chosen.labels.tolist() == [3, 2, 0]


def test_images_beside_sub_folders_have_no_classes(tmp_path):
    write_image(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    write_image(tmp_path / "d" / "sub" / "b.png", np.zeros((8, 8)))
    with pytest.warns(UserWarning, match="1 of 2 images lie beside the sub-folders"):
        data = load_data(tmp_path / "d")
    assert (len(data), data.class_names) == (2, None)


ROWS = [
    {"file_name": "b.png", "text": "ein Würfel", "label": "cube", "age": 1.5, "size": -2},
    {"file_name": "sub/ä.png", "text": "a ball, round", "label": "ball", "age": 2, "size": 0},
]


def write_metadata(folder, kind, rows):
    for row in rows:
        write_image(folder / row["file_name"], np.zeros((8, 8)))
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        import csv
        import io

        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_labels_and_vectors_of_metadata(tmp_path, kind):
    write_metadata(tmp_path / "d", kind, ROWS)
    data = load_data(tmp_path / "d", vector_columns=("age", "size"))
    assert data.class_names == ["ball", "cube"]
    assert data.vector_dim == 2
    assert data[0]["caption"] == data.captions[0] == "ein Würfel"
    assert data[0]["class_labels"] == 1
    assert data[0]["vector"].tolist() == [1.5, -2.0]
    assert data[1]["caption"] == "a ball, round"
    batch = next(iter(make_loader(data, 2, seed=0, start=0, stop=1, num_workers=0)))
    assert set(batch) == {"image", "class_labels", "vector"}


def test_metadata_in_sub_folders_and_numbers_as_labels(tmp_path):
    for i, name in enumerate(("one", "two")):
        write_metadata(tmp_path / "d" / name, "csv", [{"file_name": "x.png", "label": i * 3}])
    data = load_data(tmp_path / "d")
    assert (data.files, data.labels.tolist()) == (["one/x.png", "two/x.png"], [0, 3])
    assert data.class_names == ["0", "1", "2", "3"]
    write_image(tmp_path / "d" / "one" / "extra.png", np.zeros((8, 8)))
    with pytest.warns(UserWarning, match="1 images in .* are not in its metadata"):
        assert len(load_data(tmp_path / "d")) == 2


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, {"caption_column": "title"}, "caption_column='title' is no column of .*; it has age, label"),
        (ROWS, {"vector_columns": ("text",)}, "must hold a finite number in every row"),
        (ROWS, {"vector_columns": ("width",)}, "no 'width' in 2 of 2 rows"),
        ([ROWS[0], ROWS[1] | {"label": ""}], {}, "no 'label' in 1 of 2 rows"),
    ],
)
def test_refuses_metadata(tmp_path, rows, options, message):
    write_metadata(tmp_path / "d", "csv", rows)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "d", **options)


def test_refuses_a_comma_without_quotes(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, sitting\n")
    with pytest.raises(ValueError, match=r"line 2 of .*metadata\.csv has more values .* put quotes around"):
        load_data(tmp_path)


def test_refuses_a_row_without_a_label(tmp_path):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": "b.png", "label": "x"}\n')
    with pytest.raises(ValueError, match="has no 'label' in 1 of 2 rows"):
        load_data(tmp_path)


def test_refuses_metadata_rows_that_are_not_objects(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n[1, 2]\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl is no object with a file_name: \[1, 2\]"):
        load_data(str(tmp_path))


def test_refuses_metadata_of_a_missing_file(tmp_path):
    write_metadata(tmp_path / "d", "csv", ROWS)
    (tmp_path / "d" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images in .* cannot be used: b\.png is missing"):
        load_data(tmp_path / "d")


@pytest.mark.parametrize(("sizes", "expected"), [
    ([(8, 8)] * 2 + [(9, 9)], (8, 8)),  # at least half
    ([(200, 300), (100, 120)], (64, 64)),
    ([(40, 90), (35, 80)], (64, 64)),
    ([(20, 30), (21, 30), (22, 30)], (32, 32)),  # 64 would more than double them
])  # fmt: skip
def test_default_image_size(tmp_path, sizes, expected):
    for i, size in enumerate(sizes):
        write_image(tmp_path / "d" / f"{i}.png", np.zeros(size))
    assert load_data(tmp_path / "d").image_size == expected


def test_aspect_buckets(tmp_path):
    """Each image keeps its shape; a batch has one size, of about as many pixels as image_size."""
    for i, size in enumerate([(32, 32)] * 5 + [(24, 48)] * 4 + [(60, 20)] * 3):
        write_image(tmp_path / "d" / f"{i:02}.png", np.zeros(size))
    data = load_data(tmp_path / "d", image_size=32, aspect_buckets=True)
    sizes = [data[i]["image"].shape[1:] for i in range(12)]
    assert sizes == [(32, 32)] * 5 + [(24, 48)] * 4 + [(48, 24)] * 3
    assert sorted(map(len, data.buckets)) == [3, 4, 5]
    seen = []
    for batch in make_loader(data, 2, seed=0, start=0, stop=60, num_workers=0):
        assert batch["image"].shape[1:] in ((1, 32, 32), (1, 24, 48), (1, 48, 24))
        seen.append(batch["image"].shape)
    assert len(seen) == 60


def test_images_cached_in_memory_are_the_same(tmp_path):
    for i in range(3):
        write_image(tmp_path / "d" / f"{i}.png", np.random.default_rng(i).integers(0, 255, (16 + i, 40, 3)))
    write_image(tmp_path / "d" / "deep.png", Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200))
    options = {"image_size": 16, "resize_mode": "random_crop", "channels": 3}
    plain, cached = load_data(tmp_path / "d", **options), load_data(tmp_path / "d", **options, cache_images=True)
    for i in range(3):
        (tmp_path / "d" / f"{i}.png").rename(tmp_path / f"{i}.png")
    places = [StreamIndex(i, 10 * i + j, 5) for i in range(4) for j in range(3)]
    found = [cached[place]["image"] for place in places]
    for i in range(3):
        (tmp_path / f"{i}.png").rename(tmp_path / "d" / f"{i}.png")
    assert all(torch.equal(a, plain[place]["image"]) for a, place in zip(found, places, strict=True))
    assert cached[3]["image"].dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(cached))[1]["image"], plain[1]["image"])


def test_image_folder_class(tmp_path):
    write_image(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    assert ImageFolder(tmp_path / "d", channels=3)[0]["image"].shape == (3, 8, 8)
    assert ImageFolder(tmp_path / "d", DataConfig("x", image_size=4)).image_size == (4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels=2: image files have 1, 3 or 4"),
        ({"background": "greenish"}, "background='greenish' is no colour"),
        ({"image_size": (4, 4, 4)}, "image_size"),
        ({"resize_mode": "crop"}, "resize_mode='crop' is not one of"),
        ({"on_bad": "ignore"}, "on_bad='ignore' is not one of"),
        ({"streaming": True}, "streaming=True means nothing for a folder of images"),
        ({"class_names": ("a",)}, "has the class 'b', which is not one of class_names: a"),
        ({"caption_column": "text"}, "caption_column='text' means nothing for a folder without metadata"),
    ],
)
def test_refuses_options(tmp_path, options, message):
    for name in "ab":
        write_image(tmp_path / "d" / name / "1.png", np.zeros((8, 8)))
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "d", **options)
