"""Custom datasets from Python, map-style and iterable."""

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

from support.data import assert_same, load_batches
from unet_denoiser import DataConfig, Diffusion, Run, Trainer, TrainingConfig, UNet
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.sources.custom import as_dataset
from unet_denoiser.training.loop import preview


class RandomDataset(torch.utils.data.Dataset):
    """Draws its augmentation from all three global generators."""

    class_names = ("a", "b")

    def __len__(self):
        return 7

    def __getitem__(self, index):
        noise = torch.rand(()) + np.random.rand() + random.random()
        return {"image": np.full((2, 4, 6), index / 7, np.float32) * float(noise) / 3, "class_labels": index % 2}


class NumberStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return ({"image": torch.full((1, 4, 4), i / 10)} for i in range(10))


def test_custom_dataset_is_seeded_by_position():
    data = as_dataset(RandomDataset())
    assert (data.channels, data.image_size, data.class_names) == (2, (4, 6), ["a", "b"])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(data[StreamIndex(3, 8, 0)]["image"], data[StreamIndex(3, 8, 0)]["image"])
    assert not torch.equal(data[StreamIndex(3, 8, 0)]["image"], data[StreamIndex(3, 9, 0)]["image"])
    assert torch.equal(torch.get_rng_state(), before)
    straight = load_batches(data)
    assert_same(load_batches(data, start=3, num_workers=2), straight[3:])
    assert straight[0]["image"].dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_custom_stream_resumes_exactly(workers):
    data = as_dataset(NumberStream())
    straight = load_batches(data)
    values = torch.cat([batch["image"][:, 0, 0, 0] for batch in straight])
    assert_close(values, torch.arange(24) % 10 / 10)
    assert_same(load_batches(data, start=4, num_workers=workers), straight[4:])
    parts = [load_batches(data, num_processes=2, process_index=i) for i in range(2)]
    assert_same([{"image": torch.cat([a["image"], b["image"]])} for a, b in zip(*parts, strict=True)], straight)


class ListStream(torch.utils.data.IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.mark.parametrize("stream", [False, True])
def test_training_on_custom_data_with_conditions(stream, tmp_path):
    """Items have concat, context and vector; previews use those of the first items."""
    item = {"image": torch.zeros(1, 4, 4), "concat": torch.ones(2, 4, 4)}
    made = [item | {"context": torch.zeros(3, 6), "vector": torch.ones(2)}] * 5
    data = as_dataset(ListStream(made) if stream else made)
    assert (data.channels, data.concat_channels, data.context_dim, data.vector_dim) == (1, 2, 6, 2)
    options = {"num_res_blocks": 1, "attention_resolutions": (4,), "num_heads": 1, "norm_groups": 1, "image_size": 4}
    model = UNet(
        in_channels=3, out_channels=1, model_channels=4, channel_mult=(1,), context_dim=6, vector_dim=2, **options
    )
    training = TrainingConfig(steps=2, batch_size=2, device="cpu", num_workers=0)
    run = Run(tmp_path, DataConfig("mine"), model.config, Diffusion(), training)
    trainer = Trainer(model, run.process, data, training)
    for _ in trainer.steps():
        pass
    assert preview(run, trainer).exists()


IMAGE = torch.zeros(3, 4, 5)


class ByName:
    """As a table of pandas: it has len(), and names for keys."""

    def __len__(self):
        return 1

    def __getitem__(self, name):
        raise KeyError(name)


class Named(list):
    class_names = ("cat", "dog")


RGB = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4
SCALED = torch.from_numpy(RGB).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize(
    ("item", "image"),
    [
        (SCALED, SCALED),
        ({"image": Image.fromarray(RGB)}, SCALED),
        ({"img": RGB}, SCALED),
        ({"pixel_values": torch.from_numpy(RGB).permute(2, 0, 1)}, SCALED),
        ({"image": SCALED.numpy().astype(">f4")}, SCALED),
        ((Image.fromarray(RGB[..., 0]), 0), SCALED[:1]),
        ({"images": RGB[..., 0]}, SCALED[:1]),
    ],
)
def test_images_whose_meaning_is_plain(item, image):
    data = as_dataset([item])
    assert (data.channels, data.image_size) == (len(image), (4, 5))
    assert_close(data[0]["image"], image)


@pytest.mark.parametrize(
    ("item", "label"),
    [({"class_labels": "dog"}, 1), ({"label": 1}, 1), ({"labels": torch.tensor(1)}, 1), ({"label": np.int64(0)}, 0)],
)
def test_labels_whose_meaning_is_plain(item, label):
    for data in (Named([{"image": IMAGE} | item]), ListStream([{"image": IMAGE} | item])):
        data.class_names = ("cat", "dog")
        assert next(iter(load_batches(as_dataset(data), stop=1)))["class_labels"].tolist() == [label] * 4
    assert as_dataset([(IMAGE, label)])[0]["class_labels"] == label


def test_pil_images_have_the_channels_of_the_first():
    data = as_dataset([Image.fromarray(RGB), Image.fromarray(RGB[..., 0])])
    assert data[1]["image"].shape == (3, 4, 5)


def test_warns_of_images_without_black():
    with pytest.warns(UserWarning, match=r"'image' in item 0 goes from 0.* to 0.* and black is -1; give 2 \* x - 1"):
        as_dataset([{"image": torch.rand(3, 8, 8)}])


# ---- objects of `datasets` -------------------------------------------------------------------------------------------


def hub_table():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    content = {"image": [Image.fromarray(RGB)] * 4, "label": [0, 1] * 2}
    return datasets.Dataset.from_dict(content, features=features)


def as_tensors(rows):
    return {"images": [SCALED for _ in rows["image"]], "label": rows["label"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table,
        lambda table: table.with_transform(as_tensors),
        lambda table: table.with_transform(lambda rows: rows),
        lambda table: table.with_format("torch"),
        lambda table: table.with_format("numpy"),
        lambda table: table.to_iterable_dataset(),
        lambda table: table.to_iterable_dataset().with_format("torch"),
        lambda table: table.to_iterable_dataset().map(lambda row: {"pixel_values": SCALED}, remove_columns=["image"]),
        lambda table: table.to_iterable_dataset().map(lambda row: row),
        lambda table: datasets.interleave_datasets([table.to_iterable_dataset()] * 2),
        lambda table: table.to_iterable_dataset().shuffle(seed=0).filter(lambda row: True),
        lambda table: datasets.IterableDataset.from_generator(lambda: iter([table[0], table[1]])),
        lambda table: table.cast_column("image", datasets.Image(decode=False)),
    ],
)
def test_objects_of_datasets(change):
    data = as_dataset(change(hub_table()))
    assert (data.channels, data.image_size) == (3, (4, 5))
    (batch,) = load_batches(data, stop=1)
    assert sorted(set(batch["class_labels"].tolist())) == [0, 1]
    assert_close(batch["image"], SCALED.expand(4, -1, -1, -1))


def test_names_of_classes_survive_a_transform():
    assert as_dataset(hub_table().with_transform(as_tensors)).class_names == ["a", "b"]


def test_refuses_objects_of_datasets():
    with pytest.raises(TypeError, match=r"for example data\['train'\]; it has train, test"):
        as_dataset(datasets.DatasetDict({"train": hub_table(), "test": hub_table()}))
    features = datasets.Features({"image": datasets.Array3D((3, 4, 5), "float64")})
    with pytest.raises(ValueError, match=r"holds Array3D, not images; give image files .* or items {'image': tensor}"):
        as_dataset(datasets.Dataset.from_dict({"image": [np.zeros((3, 4, 5))]}, features=features))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "data is a int; give a dataset"),
        ([], ValueError, "no items"),
        ([{"pixels": 1}], ValueError, "item 0 of the dataset has the keys pixels"),
        ([(1, 2)], ValueError, "item 0 of the dataset is a tuple; give dicts with 'image'"),
        ([{"image": np.zeros((3, 4, 4), np.int64)}], ValueError, r"'image' in item 0 is torch.int64 \(3, 4, 4\)"),
        ([{"image": np.zeros((5, 4, 7), np.uint8)}], ValueError, r"'image' in item 0 is torch.uint8 \(5, 4, 7\)"),
        ([{"image": "a.png"}], ValueError, "'image' in item 0 is str; give a tensor"),
        ("photos", TypeError, r"data is a str; give a dataset of dicts, or load_data\(path\)"),
        ({"image": IMAGE}, TypeError, "data is a dict; give a dataset of dicts"),
        (({"image": IMAGE} for _ in range(3)), TypeError, "is a generator, which can be read only once; give a list"),
        (map(abs, [1]), TypeError, "is a map, which can be read only once"),
        (DataLoader([{"image": IMAGE}]), TypeError, r"is a DataLoader; give its dataset, loader\.dataset"),
        (ByName(), TypeError, "is a ByName, of which .* no item .KeyError: 0.; give a dataset of dicts"),
        ([{"image": IMAGE, "class_labels": "cat"}], ValueError, "item 0 is 'cat', but the dataset has no class_names"),
        ([{"image": IMAGE, "class_labels": 1.0}], ValueError, "the label 1.0 in item 0, of type float"),
        ([(IMAGE, torch.zeros(2))], ValueError, r"'class_labels' in item 0 is torch.float32 \(2,\); give one integer"),
        (Named([{"image": IMAGE, "label": "cow"}]), ValueError, "the class 'cow', which is not one of .*: cat, dog"),
    ],
)
def test_refuses_custom_data(data, error, message):
    with pytest.raises(error, match=message):
        as_dataset(data)


def test_refuses_items_of_different_shapes():
    data = as_dataset([{"image": torch.zeros(1, 4, 4)}, {"image": torch.zeros(1, 4, 5)}])
    with pytest.raises(ValueError, match=r"item 1 has shape \(1, 4, 5\), but the first one has \(1, 4, 4\)"):
        load_batches(data)
