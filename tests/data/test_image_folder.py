"""Folders of images: modes, metadata, sizes, files that cannot be used, and what a training run makes of them."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from unet_denoiser import DataConfig, ImageFolder, load_data
from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.sources import verification as scan_module
from unet_denoiser.data.transforms import UnreadableItemError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, np.uint8))
    image.save(path, **options)
    return path


def only(folder, **options):
    """The one image of a folder."""
    return load_data(folder, **options)[0]["image"]


def colours(image):
    """The mean of each channel, as bytes."""
    return ((image.mean((1, 2)) + 1) * 127.5).round().tolist()


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 51, [51, 51, 51]),
        ("LA", (0, 0), [255, 0, 0]),  # clear: the background
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (9, 9, 9, 0), [255, 0, 0]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("YCbCr", (0, 128, 128), [0, 0, 0]),
    ],
)
def test_modes_become_rgb_on_the_background(tmp_path, mode, colour, rgb):
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    write(tmp_path / "d" / f"a.{suffix}", Image.new(mode, (8, 8), colour))
    assert colours(only(tmp_path / "d", channels=3, background="#ff0000")) == rgb


def test_transparency_of_palettes_and_of_plain_colours(tmp_path):
    """A palette's entry, and a PNG's one transparent colour, are as clear as alpha is."""
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    write(tmp_path / "p" / "a.png", palette, transparency=1)
    write(tmp_path / "q" / "a.png", Image.new("RGB", (8, 8), (10, 20, 30)), transparency=(10, 20, 30))
    write(tmp_path / "r" / "a.png", palette)
    assert colours(only(tmp_path / "p")) == [255, 255, 255]
    assert colours(only(tmp_path / "q")) == [255, 255, 255]
    assert colours(only(tmp_path / "r")) == [10, 20, 30]
    assert only(tmp_path / "p", channels=4)[3].unique().item() == -1  # kept as alpha


def test_16_bit_greys_keep_their_precision(tmp_path):
    values = np.arange(20_000, 20_064, dtype=np.uint16).reshape(8, 8)  # within one step of 8 bits
    write(tmp_path / "d" / "deep.png", Image.fromarray(values))
    expected = torch.from_numpy(values.astype(np.float32)) / 32767.5 - 1
    assert_close(only(tmp_path / "d")[0], expected)
    assert_close(only(tmp_path / "d", channels=4), torch.stack([expected] * 3 + [torch.ones(8, 8)]))
    write(tmp_path / "t" / "deep.tif", Image.fromarray(values.astype(np.int32)))
    assert_close(only(tmp_path / "t")[0], expected)


def test_upright_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    image = np.zeros((16, 8, 3))
    image[:8] = 255
    write(tmp_path / "d" / "a.png", image, exif=exif)
    data = load_data(tmp_path / "d")
    assert data.image_size == (8, 16)
    assert data[0]["image"][0, 0].tolist() == [-1.0] * 8 + [1.0] * 8


def test_alpha_does_not_bleed_when_scaled(tmp_path):
    """The colour of clear pixels does not count: an average of premultiplied ones."""
    array = np.zeros((16, 16, 4))
    array[:, ::2] = (255, 0, 0, 255)
    write(tmp_path / "d" / "a.png", array)
    image = only(tmp_path / "d", channels=4, image_size=4)
    assert colours(image)[:3] == [255, 0, 0]
    assert 100 < colours(image)[3] < 155


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
        write(tmp_path / "d" / name / "1.png", np.zeros((8, 8)))
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "d", **options)


# ---- classes and metadata --------------------------------------------------------------------------------------------


def test_classes_are_the_first_sub_folders(tmp_path):
    """Whatever they are called, however deep the files; and other files do not disturb."""
    for name in ("train/a.png", "Ünïcode ✓/deep/er/b.JPG", "test/c.webp"):
        write(tmp_path / "d" / name, np.zeros((8, 8)))
    for name in ("Thumbs.db", "train/.DS_Store", "test/notes.txt", "test/._c.webp", ".hidden/x.png"):
        (tmp_path / "d" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(b"no image")
    data = load_data(tmp_path / "d")
    assert (len(data), data.class_names) == (3, ["test", "train", "Ünïcode ✓"])
    assert data.labels.tolist() == [0, 1, 2]
    chosen = load_data(tmp_path / "d", class_names=("Ünïcode ✓", "none", "train", "test"))
    assert chosen.labels.tolist() == [3, 2, 0]


def test_images_beside_sub_folders_have_no_classes(tmp_path):
    write(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    write(tmp_path / "d" / "sub" / "b.png", np.zeros((8, 8)))
    with pytest.warns(UserWarning, match="1 of 2 images lie beside the sub-folders"):
        data = load_data(tmp_path / "d")
    assert (len(data), data.class_names) == (2, None)


ROWS = [
    {"file_name": "b.png", "text": "ein Würfel", "label": "cube", "age": 1.5, "size": -2},
    {"file_name": "sub/ä.png", "text": "a ball, round", "label": "ball", "age": 2, "size": 0},
]


def write_metadata(folder, kind, rows):
    for row in rows:
        write(folder / row["file_name"], np.zeros((8, 8)))
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
def test_metadata_brings_captions_labels_and_vectors(tmp_path, kind):
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
    write(tmp_path / "d" / "one" / "extra.png", np.zeros((8, 8)))
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


def test_a_comma_without_quotes_is_told(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, sitting\n")
    with pytest.raises(ValueError, match=r"row 1 of .*metadata\.csv has more values .* put quotes around"):
        load_data(tmp_path)


def test_a_first_row_without_label_does_not_hide_those_of_others(tmp_path):
    for name in "ab":
        Image.new("L", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n{"file_name": "b.png", "label": "x"}\n')
    with pytest.raises(ValueError, match="has no 'label' in 1 of 2 rows"):
        load_data(tmp_path)


def test_labels_with_large_gaps(tmp_path):
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(tmp_path / "years.npz", images=images, labels=[7, 8, 9, 9])
    with pytest.warns(UserWarning, match="has images of 3 of the 10 classes 0 to 9"):
        load_data(tmp_path / "years.npz")
    np.savez(tmp_path / "ids.npz", images=images, labels=[7, 8, 9, 10**8])
    with pytest.raises(ValueError, match="go up to 100000000; give names, or integers from 0 without gaps"):
        load_data(tmp_path / "ids.npz")


def test_rows_of_metadata_that_are_no_objects(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n[1, 2]\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metadata.jsonl is no object with a file_name: \[1, 2\]"):
        load_data(str(tmp_path))


def test_metadata_that_names_a_missing_file(tmp_path):
    write_metadata(tmp_path / "d", "csv", ROWS)
    (tmp_path / "d" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images in .* cannot be used: b\.png is missing"):
        load_data(tmp_path / "d")


# ---- files that cannot be used ---------------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    """Six files, five of them bad, each in its own way."""
    folder = tmp_path / "d"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    content = write(folder / "fine.png", noise).read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    jpeg = write(folder / "cut.jpg", noise).read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    write(folder / "small.png", np.zeros((64, 31, 3)))
    return folder


def test_the_scan_names_every_bad_file(bad):
    with pytest.raises(ValueError, match="5 of 6 images") as info:
        load_data(bad, image_size=64)
    text = str(info.value)
    for words in (
        "cut.png cannot be read as an image",
        "cut.jpg cannot be read as an image",
        "empty.png is empty",
        "text.jpg cannot be read as an image: no image format that is known",
        "small.png is 64x31, less than half of image_size 64x64",
        "--on-bad skip",
    ):
        assert words in text
    with pytest.warns(UserWarning, match="5 of 6 images .* They are left out"):
        data = load_data(bad, image_size=64, on_bad="skip")
    assert data.files == ["fine.png"]


def test_nothing_left(tmp_path):
    write(tmp_path / "d" / "a.png", np.zeros((8, 8))).write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(ValueError, match="None is left"):
        load_data(tmp_path / "d", on_bad="skip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images were found in .*empty"):
        load_data(tmp_path / "empty")


def test_the_scan_is_remembered_until_a_file_changes(tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / "d" / f"{i}.png", np.full((8, 8), i))
    decoded = []
    original = scan_module.open_image
    monkeypatch.setattr(scan_module, "open_image", lambda *a: decoded.append(a[1]) or original(*a))
    load_data(tmp_path / "d")
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    decoded.clear()
    load_data(tmp_path / "d")
    assert decoded == []
    (tmp_path / "d" / "1.png").write_bytes(b"now broken")
    with pytest.raises(ValueError, match=r"1 of 3 .* 1\.png"):
        load_data(tmp_path / "d")
    assert decoded == ["1.png"]


def test_the_scan_needs_no_place_for_its_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "file"))
    write(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    assert len(load_data(tmp_path / "d")) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_later_is_replaced(tmp_path, workers):
    """By the next one, the same on every machine; and asked for by itself it says what is wrong."""
    for i in range(4):
        write(tmp_path / "d" / f"{i}.png", np.full((8, 8), 50 * i))
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


# ---- size and shape --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "expected"), [
    ([(8, 8)] * 2 + [(9, 9)], (8, 8)),  # at least half
    ([(200, 300), (100, 120)], (64, 64)),
    ([(40, 90), (35, 80)], (64, 64)),
    ([(20, 30), (21, 30), (22, 30)], (32, 32)),  # would be more than doubled
])  # fmt: skip
def test_default_sizes(tmp_path, sizes, expected):
    for i, size in enumerate(sizes):
        write(tmp_path / "d" / f"{i}.png", np.zeros(size))
    assert load_data(tmp_path / "d").image_size == expected


def halves(height, width):
    """White on the left half, black on the right one."""
    array = np.zeros((height, width))
    array[:, : width // 2] = 255
    return array


def test_resize_modes(tmp_path):
    write(tmp_path / "d" / "a.png", halves(16, 32))
    by_mode = {
        mode: only(tmp_path / "d", image_size=16, resize_mode=mode, background="black")[0]
        for mode in ("center_crop", "pad", "stretch")
    }
    assert (by_mode["center_crop"][8] > 0).tolist() == [True] * 8 + [False] * 8
    assert_close(by_mode["center_crop"][:, :4], torch.ones(16, 4))
    assert_close(by_mode["pad"][[0, 3, 12, 15]], -torch.ones(4, 16))
    assert_close(by_mode["pad"][4:12, :5], torch.ones(8, 5))
    assert by_mode["stretch"][0, 0] == by_mode["stretch"][15, 0] == 1


def test_augmentation_depends_on_seed_and_position_alone(tmp_path):
    write(tmp_path / "d" / "a.png", np.random.default_rng(0).integers(0, 255, (16, 40, 3)))
    data = load_data(tmp_path / "d", image_size=16, resize_mode="random_crop", horizontal_flip=True)
    plain = data[0]["image"]
    assert torch.equal(plain, data[0]["image"])
    views = [data[StreamIndex(0, position, 1)]["image"] for position in range(60)]
    assert torch.equal(views[7], data[StreamIndex(0, 7, 1)]["image"])
    assert not torch.equal(views[7], data[StreamIndex(0, 7, 2)]["image"])
    whole = load_data(tmp_path / "d", image_size=(16, 40))[0]["image"]
    crops = {(x, flip) for view in views for x in range(25) for flip in (False, True)
             if torch.equal(view.flip(-1) if flip else view, whole[..., x : x + 16])}  # fmt: skip
    assert len(crops) > 20  # of 50
    assert {x for x, _ in crops} >= {0, 24} or len({x for x, _ in crops}) > 15
    assert {flip for _, flip in crops} == {False, True}


def test_aspect_buckets(tmp_path):
    """Each image keeps its shape; a batch has one size, and as many pixels as image_size."""
    for i, size in enumerate([(32, 32)] * 5 + [(24, 48)] * 4 + [(60, 20)] * 3):
        write(tmp_path / "d" / f"{i:02}.png", halves(*size))
    data = load_data(tmp_path / "d", image_size=32, aspect_buckets=True)
    sizes = [data[i]["image"].shape[1:] for i in range(12)]
    assert sizes == [(32, 32)] * 5 + [(24, 48)] * 4 + [(48, 24)] * 3
    assert sorted(map(len, data.buckets)) == [3, 4, 5]
    seen = []
    for batch in make_loader(data, 2, seed=0, start=0, stop=60, num_workers=0):
        assert batch["image"].shape[1:] in ((1, 32, 32), (1, 24, 48), (1, 48, 24))
        seen.append(batch["image"].shape)
    assert len(seen) == 60


def test_cached_images_are_the_same(tmp_path):
    for i in range(3):
        write(tmp_path / "d" / f"{i}.png", np.random.default_rng(i).integers(0, 255, (16 + i, 40, 3)))
    write(tmp_path / "d" / "deep.png", Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 200))
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


def test_a_folder_data_set_by_its_class(tmp_path):
    write(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    assert ImageFolder(tmp_path / "d", channels=3)[0]["image"].shape == (3, 8, 8)
    assert ImageFolder(tmp_path / "d", DataConfig("x", image_size=4)).image_size == (4, 4)
