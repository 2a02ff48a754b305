"""Custom datasets from Python, map-style and iterable."""

import random

import numpy as np
import pytest
import torch
from torch.testing import assert_close

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


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (3, TypeError, "data is a int; give a dataset"),
        ([], ValueError, "no items"),
        ([torch.zeros(1, 4, 4)], ValueError, "item 0 of the dataset is a Tensor; give dicts with 'image'"),
        ([{"pixels": 1}], ValueError, "item 0 of the dataset has the keys pixels"),
        ([{"image": np.zeros((4, 4, 3), np.uint8)}], ValueError, r"'image' in item 0 is torch.uint8 \(4, 4, 3\)"),
        ([{"image": "a.png"}], ValueError, "'image' in item 0 is str; give a tensor"),
    ],
)
def test_refuses_custom_data(data, error, message):
    with pytest.raises(error, match=message):
        as_dataset(data)


def test_refuses_items_of_different_shapes():
    data = as_dataset([{"image": torch.zeros(1, 4, 4)}, {"image": torch.zeros(1, 4, 5)}])
    with pytest.raises(ValueError, match=r"item 1 has shape \(1, 4, 5\), but the first one has \(1, 4, 4\)"):
        load_batches(data)
