"""Small trainings that several tests share."""

import re

import numpy as np
import torch

from support.networks import SMALL
from unet_denoiser import ArrayDataset, DataConfig, Diffusion, Run, Trainer, TrainingConfig, UNet
from unet_denoiser.training.checkpoints import parse_step

NET = SMALL | {"in_channels": 1, "out_channels": 1, "image_size": 4, "attention_resolutions": (), "dropout": 0.1}


def two_classes(count=32):
    """4x4 images, all -0.5 in class 0 and all 0.5 in class 1, with a little noise."""
    labels = np.arange(count) % 2
    noise = np.random.default_rng(0).normal(0, 0.02, (count, 1, 4, 4))
    return ArrayDataset((labels[:, None, None, None] - 0.5 + noise).astype(np.float32), labels, ["low", "high"])


def make_trainer(options=None, process=None, net=None, data=None):
    config = TrainingConfig(**{"steps": 6, "batch_size": 8, "warmup_steps": 2, "device": "cpu"} | (options or {}))
    torch.manual_seed(config.seed)
    model = UNet(**NET | {"num_classes": 2} | (net or {}))
    return Trainer(model, process or Diffusion(), data or two_classes(), config)


def make_run(folder):
    """A run on the two classes in a file, not yet trained."""
    data = two_classes()
    np.savez(folder / "two.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    options = {"steps": 25, "batch_size": 4, "checkpoint_every": 10, "preview_every": 20, "device": "cpu"}
    config = DataConfig(str(folder / "two.npz"), (4, 4), 1, ("low", "high"))
    model = UNet(**NET | {"num_classes": 2}).config
    run = Run(folder / "run", config, model, Diffusion(), TrainingConfig(**options))
    run.write()
    return run


def assert_equal(a, b):
    """Two dictionaries hold the same tensors, bit for bit."""
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def weights(module):
    return {name: p.detach().clone() for name, p in module.state_dict().items()}


class Vectors(ArrayDataset):
    """A custom dataset with a vector and tokens beside each image."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"vector": torch.ones(3), "context": torch.randn(2, 5)}


def steps_kept(run):
    return [parse_step(path) for path in run.checkpoints.paths()]


def without_times(metrics):
    """Return metrics.jsonl without the times, which differ between equal runs."""
    return re.sub(r', "data_wait": [0-9.]+', "", metrics)
