"""What the evaluate command measures: samples of a run or of files, and the data they are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.config.unet import CONDITIONS, UNetConfig
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.data.sources.arrays import load_npz
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.data.transforms import open_image
from unet_denoiser.evaluation.feature_cache import BATCH, stacked
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.training.checkpoints import read_metadata
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import read_json


class GeneratedSamples:
    """Samples of a run, made batch by batch when they are iterated over; sample i has the seed SEED + i.

    Their conditions are those of the data: classes alone in the data's proportions, others taken from its items.

    Args:
        run: with the averaged weights of `checkpoint`.
        data: what conditions are taken from, with all that the network needs.
        count: how many.
        seed: of the first.
        batch_size: made at a time.
        config: how they are made.

    Raises:
        ValueError: a run whose conditions the data do not have, or a configuration that cannot work with it.
    """

    def __init__(
        self,
        run: Run,
        data: ImageDataset,
        count: int,
        *,
        seed: int = 0,
        batch_size: int = 64,
        checkpoint: str = "latest",
        device: str | torch.device = "cpu",
        config: SamplingConfig | None = None,
    ) -> None:
        self.data, self.count, self.seed, self.batch_size = data, count, seed, batch_size
        self.config = config or SamplingConfig()
        Sampler(self.config, run.process)  # refuses what cannot work before anything else takes time
        self.pipeline = run.load_pipeline(checkpoint, device)
        self.names = _conditions(run.model, data)
        if not self.names and self.config.guidance_scale != 1:
            scale = self.config.guidance_scale
            raise ValueError(f"guidance_scale={scale} needs conditions, which {run.path} was trained without; give 1")
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
            "step": int(read_metadata(paths[-1])["step"]) if paths else None,
            "seed": seed,
            "batch_size": batch_size,
            "sampling": asdict(self.config),
        }

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        with tqdm(total=self.count, desc="samples", unit="img", disable=None) as bar:
            for start in range(0, self.count, self.batch_size):
                stop = min(start + self.batch_size, self.count)
                x = sample(
                    self.pipeline.model,
                    self.pipeline.process,
                    seeds=range(self.seed + start, self.seed + stop),
                    batch_size=self.batch_size,
                    config=self.config,
                    **self._conditions_of(start, stop),
                )
                yield self.pipeline.decode(x.cpu())
                bar.update(stop - start)

    def _conditions_of(self, start: int, stop: int) -> dict[str, Any]:
        if self.names == ["class_labels"]:
            assert self.labels is not None
            return {"class_labels": self.labels[start:stop]}
        if not self.names:
            return {}
        items = [self.data[i] for i in self.items[start:stop].tolist()]
        return {name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in self.names}


class SampleFiles:
    """Samples in a folder of .npz files, in the order of their names, as `sample` writes many; read one file at a time.

    Args:
        paths: files with `images` (N, H, W[, C]) of 0 to 255, and perhaps `labels` (N,).
        like: data of the same size and channels.

    Raises:
        ValueError: files of another size, or fewer samples than the folder's settings.json says.
    """

    def __init__(self, paths: Sequence[Path], like: ImageDataset) -> None:
        self.paths, self.count = paths, 0
        labels: list[Tensor] = []
        for path in paths:
            part = load_npz(path, DataConfig(str(path)))
            if (shape := (part.channels, *part.image_size)) != (like.channels, *like.image_size):
                raise ValueError(f"samples={path} are of shape {shape}, the data {(like.channels, *like.image_size)}")
            self.count += len(part)
            labels += [] if part.labels is None else [part.labels]
        self.labels = torch.cat(labels) if len(labels) == len(paths) else None
        settings = paths[0].with_name("settings.json")
        wanted = read_json(settings).get("num_images", self.count) if settings.is_file() else self.count
        if self.count != wanted:
            raise ValueError(f"samples={paths[0].parent} has {self.count:,} of its {wanted:,} samples; finish it first")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        with tqdm(total=self.count, desc="features of samples", unit="img", disable=None) as bar:
            for path in self.paths:
                part = load_npz(path, DataConfig(str(path)))
                for start in range(0, len(part), BATCH):
                    yield stacked(part, np.arange(start, min(start + BATCH, len(part))))
                bar.update(len(part))


def _pictures(config: DataConfig, name: str) -> ImageDataset:
    """The pictures alone that a configuration names: no latents, no captions encoded, all of one size.

    Raises:
        ValueError: a stream.
    """
    plain = replace(config, text_encoder=None, caption_length=None, vae=None, standardize_latents=False, concat=None)
    plain = replace(
        plain, latent_mean=None, latent_std=None, horizontal_flip=False, aspect_buckets=False, cache_images=False
    )
    return _indexed(load_data(plain), name)


def conditioned_data(config: DataConfig, pictures: ImageDataset) -> ImageDataset:
    """The data that a run's conditions are taken from: with captions encoded and pictures to concatenate."""
    if config.text_encoder is None and config.concat is None:
        return pictures
    return _indexed(load_data(replace(config, horizontal_flip=False, aspect_buckets=False)), "data")


def read_samples(source: Path, like: ImageDataset) -> ImageDataset | SampleFiles:
    """Samples in a folder of pictures or of .npz files, an .npz or an .npy, of the data's size; classes by their names.

    Raises:
        ValueError: pictures of another size; nothing is scaled unseen.
    """
    if paths := sorted(source.glob("*.npz")):
        return SampleFiles(paths, like)
    channels = like.channels if source.is_dir() else None  # arrays are not converted
    found = _indexed(load_data(str(source), channels=channels), "samples")
    size = tuple(found.image_size)
    if isinstance(found, EncodedImages):
        width, height = open_image(str(found.source(0))).size
        size = (height, width)
        if size == tuple(like.image_size) != tuple(found.image_size):  # a large size is not taken by itself
            found = _indexed(load_data(str(source), channels=channels, image_size=size), "samples")
    if size != tuple(like.image_size):
        raise ValueError(f"samples={source} are of size {size}, the data of {tuple(like.image_size)}")
    if found.labels is not None and found.class_names is not None:
        known = like.class_names or []
        same = set(found.class_names) <= set(known)
        found.labels = torch.tensor([known.index(name) for name in found.class_names])[found.labels] if same else None
    return found


def evaluated_data(
    run: Run | None, source: str | None, held_out: str | None, held_out_split: str | None
) -> tuple[DataConfig, ImageDataset, ImageDataset | None]:
    """The training images and those held out, both as the run would read them; and the configuration of the former.

    Args:
        source: of the training images (default: the run's).
        held_out: source of the others, or None.
        held_out_split: split of the others, with the training images' source.

    Raises:
        ValueError, OSError: data that are not there or cannot be compared.
    """
    if held_out is not None and held_out_split is not None:
        raise ValueError("held_out and held_out_split: give one of them")
    config = DataConfig(source or "") if run is None else replace(run.data, source=source or run.data.source)
    images = _pictures(config, "data")
    if held_out is None and held_out_split is None:
        return config, images, None
    same = replace(config, image_size=images.image_size, class_names=tuple(images.class_names or ()) or None)
    same = replace(same, source=held_out or config.source, split=held_out_split or config.split)
    return config, images, _pictures(same, "held_out")


def _indexed(data: ImageDataset | StreamDataset, name: str) -> ImageDataset:
    if isinstance(data, StreamDataset):
        raise ValueError(f"{name} is a stream, which has no order to compare in; give data without streaming")
    return data


def _conditions(config: UNetConfig, data: ImageDataset) -> list[str]:
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
