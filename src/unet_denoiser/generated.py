"""What the evaluate command measures: samples of a run or of files, and the data they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.checkpoints import read_facts
from unet_denoiser.config import UNetConfig
from unet_denoiser.data import ImageData, StreamData, load_data
from unet_denoiser.data.decode import open_image
from unet_denoiser.data.pictures import Pictures
from unet_denoiser.inputs import CONDITIONS
from unet_denoiser.recipe import DataConfig
from unet_denoiser.run import Run
from unet_denoiser.sampling import sample


class Generated:
    """Samples of a run, made batch by batch when they are iterated over; sample i has the seed SEED + i.

    Their conditions are those of the data: classes alone in the data's proportions, others taken from its items.

    Args:
        run: with the averaged weights of `checkpoint`.
        data: what conditions are taken from, with all that the network needs.
        count: how many.
        seed: of the first.
        batch_size: made at a time.
        options: of `sample`, such as `num_inference_steps`.

    Raises:
        ValueError: a run whose conditions the data do not have.
    """

    def __init__(
        self,
        run: Run,
        data: ImageData,
        count: int,
        *,
        seed: int = 0,
        batch_size: int = 64,
        checkpoint: str = "latest",
        device: str | torch.device = "cpu",
        **options: Any,
    ) -> None:
        self.run, self.data, self.count, self.seed = run, data, count, seed
        self.batch_size, self.options = batch_size, options
        self.model = run.load_model(checkpoint).to(device)
        self.names = _conditions(self.model.config, data)
        self.items = np.resize(np.random.default_rng(seed).permutation(len(data)), count)
        self.labels: Tensor | None = None
        if "class_labels" in self.names:
            assert data.labels is not None
            self.labels = data.labels[torch.from_numpy(self.items)]
            if self.names == ["class_labels"]:
                self.labels = _in_proportion(data.labels, count, seed)
        paths = run.checkpoints.paths() if checkpoint == "latest" else [run.checkpoints.find(checkpoint)]
        self.about = {
            "run": str(run.path),
            "checkpoint": checkpoint,
            "step": int(read_facts(paths[-1])["step"]) if paths else None,
            "seed": seed,
            "batch_size": batch_size,
            "sampling": options,
        }

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        with tqdm(total=self.count, desc="samples", unit="img", disable=None) as bar:
            for start in range(0, self.count, self.batch_size):
                stop = min(start + self.batch_size, self.count)
                given = self.options | self._conditions_of(start, stop)
                seeds = range(self.seed + start, self.seed + stop)
                x = sample(self.model, self.run.process, seeds=seeds, batch_size=self.batch_size, **given)
                yield self.run.decode(x.cpu())
                bar.update(stop - start)

    def _conditions_of(self, start: int, stop: int) -> dict[str, Tensor]:
        if self.names == ["class_labels"]:
            assert self.labels is not None
            return {"class_labels": self.labels[start:stop]}
        if not self.names:
            return {}
        items = [self.data[i] for i in self.items[start:stop].tolist()]
        return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in self.names}


def picture_data(config: DataConfig, name: str = "data") -> ImageData:
    """The pictures alone that a configuration names: no latents, no captions encoded, all of one size.

    Raises:
        ValueError: a stream.
    """
    plain = replace(config, text_encoder=None, caption_length=None, vae=None, standardize_latents=False, concat=None)
    plain = replace(plain, latent_mean=None, latent_std=None, horizontal_flip=False, aspect_buckets=False)
    return _indexed(load_data(plain), name)


def conditioned_data(config: DataConfig, pictures: ImageData) -> ImageData:
    """The data that a run's conditions are taken from: with captions encoded and pictures to concatenate."""
    if config.text_encoder is None and config.concat is None:
        return pictures
    return _indexed(load_data(replace(config, horizontal_flip=False, aspect_buckets=False)), "data")


def samples_of_files(source: Path, like: ImageData, count: int | None) -> ImageData:
    """Samples that were written to a folder of pictures, an .npz or .npy, of the data's size and channels.

    Args:
        count: use the first so many.

    Raises:
        ValueError: pictures of another size.
    """
    # its size is the data's, so that nothing is scaled unseen; a folder's channels are converted, an array's are not
    channels = like.channels if source.is_dir() else None
    found = _indexed(load_data(str(source), image_size=like.image_size, channels=channels), "samples")
    size = found.image_size
    if isinstance(found, Pictures):
        width, height = open_image(str(found.source(0))).size
        size = (height, width)
    elif hasattr(found, "images"):
        size = tuple(np.load(source)["images"].shape[1:3]) if source.suffix == ".npz" else found.images.shape[2:]
    if tuple(size) != tuple(like.image_size):
        raise ValueError(f"samples={source} are of size {tuple(size)}, the data of {tuple(like.image_size)}")
    return found


def _indexed(data: ImageData | StreamData, name: str) -> ImageData:
    if isinstance(data, StreamData):
        raise ValueError(f"{name} is a stream, which has no order to compare in; give data without streaming")
    return data


def _conditions(config: UNetConfig, data: ImageData) -> list[str]:
    """The names of what the network is conditioned on; ValueError where the data have no such thing."""
    names = [name for name, option in CONDITIONS.items() if getattr(config, option) is not None]
    names += ["concat"] * (data.concat_channels > 0)
    if names:
        item = data[0]
        if missing := [name for name in names if name not in item]:
            raise ValueError(f"the run is conditioned on {missing[0]}, which the data do not have")
        names += ["context_mask"] * ("context_mask" in item)
    return names


def _in_proportion(labels: Tensor, count: int, seed: int) -> Tensor:
    """(count,) labels with each class's share as in the data, to one sample, in a random order."""
    positions = (np.arange(count) + 0.5) / count * len(labels)
    spread = labels.sort().values[torch.from_numpy(positions.astype(np.int64))]
    return spread[torch.from_numpy(np.random.default_rng(seed).permutation(count))]
