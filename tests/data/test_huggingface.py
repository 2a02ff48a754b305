"""Hugging Face datasets: columns, rows that cannot be used, and streams that resume exactly."""

import io
import pickle

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser import load_data
from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.data.sources.huggingface import HubDataset, HubStream


@pytest.fixture(autouse=True)
def datasets_cache(cache, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


def table(rows=20, first=0, **columns):
    """Rows of grey images whose value is their number, of alternating classes, with captions and a number."""
    numbers = range(first, first + rows)
    content = {
        "image": [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in numbers],
        "label": [i % 2 for i in numbers],
        "text": [f"number {i}" for i in numbers],
        "age": [i / 10 for i in numbers],
    } | columns
    made = datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())
    return made.cast_column("label", datasets.ClassLabel(names=["even", "odd"])) if "label" not in columns else made


def values(batches):
    """The images' numbers."""
    return [round(v) for batch in batches for v in ((batch["image"][:, 0, 0, 0] + 1) * 127.5).tolist()]


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    """A folder of three Parquet files, 30 rows."""
    (tmp_path / "shards").mkdir()
    for i, (first, rows) in enumerate([(0, 8), (8, 15), (23, 7)]):
        table(rows, first).to_parquet(tmp_path / "shards" / f"part-{i}.parquet")
    return tmp_path / "shards"


def test_parquet_with_every_condition(shards):
    data = load_data(shards, vector_columns=("age",))
    assert (len(data), data.channels, data.image_size, data.class_names) == (30, 1, (8, 8), ["even", "odd"])
    item = data[13]
    assert (item["caption"], item["class_labels"], item["vector"].tolist()) == ("number 13", 1, [pytest.approx(1.3)])
    assert data.captions[13] == "number 13"
    loader = make_loader(pickle.loads(pickle.dumps(data)), 6, seed=0, start=0, stop=5, num_workers=0)
    assert sorted(values(loader)) == list(range(30))
    one = load_data(shards / "part-1.parquet", class_names=("odd", "even"))
    assert (len(one), one.labels.tolist()[:3]) == (15, [1, 0, 1])


def test_columns_by_name_and_datasets_from_python(tmp_path):
    made = table(6).rename_columns({"image": "picture", "text": "title"})
    data = HubDataset(made, image_column="picture", caption_column="title", label_column="label")
    assert data[4]["caption"] == "number 4"
    assert isinstance(as_dataset(made), HubDataset)
    assert as_dataset(made).captions is None
    names = HubDataset(table(4, label=["b", "a", "b", "a"]))
    assert (names.class_names, names.labels.tolist()) == (["a", "b"], [1, 0, 1, 0])
    plain = datasets.Dataset.from_dict({"image": [{"bytes": png(np.full((8, 8, 3), 9, np.uint8)), "path": None}]})
    assert HubDataset(plain)[0]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "picture"}, "image_column='picture' is no column of .*; it has age, image, label, text"),
        ({"label_column": "kind"}, "label_column='kind' is no column"),
        ({"vector_columns": ("text",)}, "must hold a finite number in every row"),
        ({"label_column": "age"}, "the label 0.0 in row 0, of type float; give names, or integers from 0"),
        ({"class_names": ("even",)}, "class 'odd', which is not one of class_names"),
    ],
)
def test_refuses_columns(options, message):
    with pytest.raises(ValueError, match=message):
        HubDataset(table(4), **options)


def test_refuses_tables(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"d\.parquet cannot be loaded as a dataset"):
        load_data(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"hf:no-such/name cannot be loaded as a dataset"):
        load_data("hf:no-such/name")
    with pytest.raises(ValueError, match="no column of images"):
        HubDataset(datasets.Dataset.from_dict({"a": [1]}))
    with pytest.raises(TypeError, match=r"give one split of it"):
        as_dataset(datasets.DatasetDict({"train": table(2)}))


def test_rows_that_cannot_be_used():
    cells = [{"bytes": content, "path": None} for content in (png(np.zeros((8, 8), np.uint8)), b"", b"nonsense")]
    made = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"2 of 3 images .* row 1 is empty; row 2 cannot be read as an image"):
        HubDataset(made)
    with pytest.warns(UserWarning, match="2 of 3"):
        data = HubDataset(made, on_bad="skip")
    assert (len(data), data.labels.tolist()) == (1, [0])


def write_splits(folder, **files):
    """Write .parquet files, their names without suffix, of as many rows as given."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        path = folder / f"{name.replace('__', '/')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table(rows).to_parquet(path)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"),
        ("data__train-00000-of-00001", "data__test-00000-of-00001", "data__validation-00000-of-00001"),
        ("train__a", "test__a", "val__a"),
        ("my_train", "my_test", "dev"),
        ("cats__train_1", "cats__test_1", "cats__valid_1"),
    ],
)
def test_splits_of_a_folder(tmp_path, names):
    folder = write_splits(tmp_path / "test", **dict(zip(names, (3, 2, 1), strict=True)))
    with pytest.warns(UserWarning, match="has several splits: train is read, test, validation left out"):
        assert len(load_data(folder)) == 3
    assert [len(load_data(folder, split=split)) for split in ("test", "validation", "test+validation")] == [2, 1, 3]
    assert len(load_data(folder, split="train[:2]")) == 2
    with pytest.raises(ValueError, match="has no split 'nonsense'; it has test, train, validation"):
        load_data(folder, split="nonsense")


def test_folders_whose_names_tell_no_splits(tmp_path):
    folder = write_splits(tmp_path / "d", one=3, two=2)
    (folder / ".hidden.parquet").write_bytes(b"litter")
    assert len(load_data(folder)) == 5
    with pytest.raises(ValueError, match="has no split 'test'; its names tell no splits; leave it out"):
        load_data(folder, split="test")
    with pytest.raises(ValueError, match="has no split 'test'"):
        load_data(folder / "one.parquet", split="test")
    write_splits(tmp_path / "e", test=2)
    assert len(load_data(tmp_path / "e" / "test.parquet")) == 2
    with pytest.warns(UserWarning, match="has the split test only, which is read"):
        assert len(load_data(tmp_path / "e")) == 2
    write_splits(tmp_path / "e", train=1, extra=1)
    with pytest.warns(UserWarning, match=r"1 of 3 \.parquet files in .* are left out, as .*extra\.parquet"):
        assert len(load_data(tmp_path / "e")) == 1


def test_linked_folders_of_files_count_once(tmp_path):
    write_splits(tmp_path / "real", train=2, test=1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(".")
    with pytest.warns(UserWarning, match="several splits"):
        assert len(load_data(tmp_path / "d")) == 2


def test_images_beside_files_of_a_table(tmp_path):
    write_splits(tmp_path / "d", data__train=2)
    Image.new("L", (8, 8)).save(tmp_path / "d" / "thumbnail.png")
    with pytest.warns(UserWarning, match=r"has images, which are used, and 1 \.parquet files, which are not"):
        assert len(load_data(tmp_path / "d")) == 1


def cells(*contents):
    return [{"bytes": content, "path": None} for content in contents]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": ["a", None]}, "1 of 2 images .* row 1 has no 'label'"),
        ({"label": [None, None]}, "2 of 2 images .* row 0 has no 'label'"),
        ({"label": [1.0, 0.0]}, "the label 1.0 in row 0, of type float"),
        ({"label": [["a"], ["b"]]}, r"the label \['a'\] in row 0, of type list"),
        ({"label": [{"name": "a"}, {"name": "b"}]}, "in row 0, of type dict"),
        ({"label": [0, -1]}, "the label -1 in row 1"),
        ({"text": ["a", ""]}, "row 1 has no 'text'"),
        ({"text": [{"raw": "a"}] * 2}, "the caption {'raw': 'a'} in row 0, of type dict"),
        ({"text": [[], ["a"]]}, "row 0 has no 'text'"),
        ({"image": [[1.0]] * 2}, "image_column='image' of .* holds List, not images"),
        ({"image": [1, 2]}, "holds int64, not images"),
        ({"image": ["a.png", "http://x/b.png"]}, "row 0 names the file a.png, which does not exist; row 1 names the"),
        ({"image": [None, None]}, "holds null, not images"),
        ({"image": [{"bytes": b"", "path": None}, None]}, "row 0 is empty; row 1 is empty"),
    ],
)
def test_refuses_cells_by_their_row(columns, message, tmp_path):
    pixels = png(np.zeros((8, 8), np.uint8))
    made = datasets.Dataset.from_dict({"image": cells(pixels, pixels)} | columns)
    made.to_parquet(tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=message):
        HubDataset(made)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / "d.parquet")


def test_labels_and_captions_are_what_the_file_says(tmp_path):
    pixels = png(np.zeros((8, 8), np.uint8))
    columns = {"label": ["01", "1", "001"], "text": [["one", "two"], ["x"], ["y"]]}
    datasets.Dataset.from_dict({"image": cells(*[pixels] * 3)} | columns).to_parquet(tmp_path / "d.parquet")
    data = load_data(tmp_path / "d.parquet")
    assert (data.class_names, data.labels.tolist(), data.captions) == (["001", "01", "1"], [1, 2, 0], ["one", "x", "y"])
    assert data.origins == {"class_labels": "column label", "caption": "column text"}
    flags = HubDataset(datasets.Dataset.from_dict({"image": cells(pixels, pixels), "label": [True, False]}))
    assert (flags.class_names, flags.labels.tolist()) == (["False", "True"], [1, 0])


def test_images_by_their_paths(tmp_path):
    Image.new("L", (8, 8), 9).save(tmp_path / "a.png")
    datasets.Dataset.from_dict({"image": ["a.png"]}).to_parquet(tmp_path / "d.parquet")
    assert values([{"image": load_data(tmp_path / "d.parquet")[0]["image"][None]}]) == [9]


def test_files_without_rows(tmp_path):
    made = datasets.Dataset.from_dict({"image": [png(np.zeros((8, 8), np.uint8))], "label": ["a"]})
    made.select([]).to_parquet(tmp_path / "d.parquet")
    for options in ({}, {"streaming": True}):
        with pytest.raises(ValueError, match=r"d\.parquet cannot be loaded as a dataset: it has no rows"):
            load_data(tmp_path / "d.parquet", **options)


def test_the_usual_names_come_before_the_kinds_of_columns():
    kinds = {name: datasets.ClassLabel(names=[f"{name} 0", f"{name} 1"]) for name in ("source", "label", "topic")}
    content = {name: [0, 1] for name in kinds}
    for name, value in (("mask", 0), ("image", 9)):
        content[name] = cells(*[png(np.full((8, 8), value, np.uint8))] * 2)
        kinds[name] = datasets.Image()
    made = datasets.Dataset.from_dict(content, features=datasets.Features(kinds))
    with pytest.warns(UserWarning, match="has the columns mask, image, of which image is used; image_column chooses"):
        data = HubDataset(made)
    assert (data.class_names, round((data[0]["image"].mean().item() + 1) * 127.5)) == (["label 0", "label 1"], 9)
    with pytest.warns(UserWarning, match="columns source, topic, of which source is used; label_column chooses"):
        assert HubDataset(made.remove_columns(["label", "mask"])).class_names == ["source 0", "source 1"]


def test_unused_columns_and_empty_classes_are_said(tmp_path):
    pixels = png(np.zeros((8, 8), np.uint8))
    columns = {"image": cells(*[pixels] * 3), "Class": ["a", "b", "c"]}
    with pytest.warns(UserWarning, match="has the column 'Class', which is not used; label_column='Class' would"):
        assert HubDataset(datasets.Dataset.from_dict(columns)).class_names is None
    datasets.Dataset.from_dict(columns | {"label": [1, 2, 3]}).to_parquet(tmp_path / "d.parquet")
    with pytest.warns(UserWarning, match="3 of its 4 classes, none of 0; its labels begin at 1"):
        load_data(tmp_path / "d.parquet")


# ---- streams ---------------------------------------------------------------------------------------------------------


def stream(shards, **options):
    return load_data(shards, streaming=True, shuffle_buffer=8, **options)


def batches(data, start, stop, **options):
    return list(make_loader(data, 4, seed=5, start=start, stop=stop, **{"num_workers": 0} | options))


def test_stream_has_all_rows_in_a_new_order_each_epoch(shards):
    data = stream(shards, vector_columns=("age",))
    assert isinstance(data, HubStream)
    assert (data.channels, data.image_size, data.class_names, data.vector_dim) == (1, (8, 8), ["even", "odd"], 1)
    found = batches(data, 0, 15)
    numbers = values(found)
    epochs = numbers[:30], numbers[30:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(30))] * 2
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    assert [v % 2 for v in numbers] == torch.cat([batch["class_labels"] for batch in found]).tolist()
    assert [v / 10 for v in numbers] == pytest.approx(torch.cat([batch["vector"] for batch in found])[:, 0].tolist())


@pytest.mark.parametrize("workers", [0, 3])
def test_stream_resumes_exactly(shards, workers):
    """In the first epoch, in the second, and in either of two processes."""
    straight = values(batches(stream(shards), 0, 15))
    for start in (3, 9):
        assert values(batches(stream(shards), start, 15, num_workers=workers)) == straight[4 * start :]
    parts = [batches(stream(shards), 2, 8, num_processes=2, process_index=i) for i in range(2)]
    joined = [v for a, b in zip(*parts, strict=True) for v in values([a, b])]
    assert joined == straight[8:32]


def test_stream_augmentation_resumes_exactly(shards):
    wide = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 14), np.uint8)) for i in range(9)]
    table(9, image=wide).to_parquet(shards.parent / "wide.parquet")
    options = {"image_size": 8, "resize_mode": "random_crop", "horizontal_flip": True}
    straight = batches(stream(shards.parent / "wide.parquet", **options), 0, 6)
    again = batches(stream(shards.parent / "wide.parquet", **options), 3, 6, num_workers=2)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(straight[3:], again, strict=True))
    epochs = straight[0]["image"], straight[3]["image"]
    assert not torch.equal(*epochs)


def test_a_bad_row_of_a_stream_is_replaced(shards):
    cells = [{"bytes": png(np.full((8, 8), i, np.uint8)) if i != 2 else b"broken", "path": None} for i in range(4)]
    made = datasets.Dataset.from_dict({"image": cells})
    data = HubStream(made.to_iterable_dataset(), shuffle_buffer=1, channels=1, image_size=8)
    with pytest.warns(UserWarning, match="is replaced by another"):
        assert sorted(values(batches(data, 0, 1))) in ([0, 0, 1, 3], [0, 1, 1, 3], [0, 1, 3, 3])


def test_rows_of_a_stream_without_labels_are_replaced(tmp_path):
    pixels = [png(np.full((8, 8), i, np.uint8)) for i in range(4)]
    columns = {"image": cells(*pixels), "label": ["a", "b", None, "a"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "d.parquet")
    data = load_data(tmp_path / "d.parquet", streaming=True, class_names=("a", "b"))
    with pytest.warns(UserWarning, match="has no 'label'; it is replaced by another"):
        assert 2 not in values(batches(data, 0, 3))
