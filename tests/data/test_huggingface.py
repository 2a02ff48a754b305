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
        ({"label_column": "age"}, "are of type float64; give names, or integers from 0"),
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
