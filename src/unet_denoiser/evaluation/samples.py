"""Samples of a run or of files for `evaluate`, and the data that they are compared with."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.data.dataset import ImageDataset, StreamDataset
from unet_denoiser.data.load import check_places, load_data, without_wrappers
from unet_denoiser.data.sources.arrays import load_npz
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.data.transforms import open_image
from unet_denoiser.evaluation.feature_extractors import Extractor
from unet_denoiser.evaluation.images import image_batches, progress_bar, stack_images
from unet_denoiser.models.conditions import Conditions
from unet_denoiser.sampling.loop import sample
from unet_denoiser.sampling.pipeline.pipeline import Pipeline
from unet_denoiser.sampling.samplers import Sampler
from unet_denoiser.training.checkpoints import read_metadata
from unet_denoiser.training.run import Run
from unet_denoiser.utils.files import read_json

TRIAL_SIZE = 16  # images that are timed


class GeneratedSamples:
    """Samples of a run or pipeline, made batch by batch when they are iterated over; sample i has seed `seed` + i.

    Their conditions are those of the data: classes alone in the data's proportions, others taken from its items.

    Args:
        run: the run, whose averaged weights of `checkpoint` are used; or a pipeline.
        data: the dataset that conditions are taken from.
        batch_size: samples per call of the network.

    Raises:
        ValueError: a run whose conditions the data do not have, or a configuration that cannot work with it.
    """

    def __init__(
        self,
        run: Run | Pipeline,
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
        self.config = config or run.sampling_config()
        Sampler(self.config, run.process)  # refuses options that cannot work before anything else takes time
        self.pipeline = run.load_pipeline(checkpoint, device) if isinstance(run, Run) else run
        self.names = [*self.pipeline.model.config.conditions, *(["concat"] if data.concat_channels > 0 else [])]
        if self.captioned:
            check_captioned(self.pipeline, data)
        elif self.names and (missing := [name for name in self.names if name not in data[0]]):
            raise ValueError(f"the run is conditioned on {missing[0]}, which the data do not have")
        if not self.names and self.config.guidance_scale != 1:
            scale = self.config.guidance_scale
            raise ValueError(f"guidance_scale={scale} needs conditions, which {run.path} was trained without; give 1")
        self.items = np.resize(np.random.default_rng(seed).permutation(len(data)), count)
        self.labels: Tensor | None = None
        if "class_labels" in self.names:
            assert data.labels is not None
            self.labels = data.labels[torch.from_numpy(self.items)]
            if self.names == ["class_labels"]:
                self.labels = proportional_labels(data.labels, count, seed)
        paths = []
        if isinstance(run, Run):
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

    @property
    def captioned(self) -> bool:
        """Return True for a published pipeline that draws from captions, which it encodes itself."""
        return self.pipeline.published is not None and self.pipeline.data.text_encoder is not None

    def __iter__(self) -> Iterator[Tensor]:
        steps = self.config.num_inference_steps
        with progress_bar(self.count * steps, "samples", unit_scale=1 / steps) as bar:
            for start in range(0, self.count, self.batch_size):
                stop = min(start + self.batch_size, self.count)
                conditions: dict[str, Any] = self.conditions(start, stop).given()
                if self.config.guidance_scale != 1:
                    conditions["negative"] = self.pipeline.encode_absence(Conditions(**conditions)).given()
                x = sample(
                    self.pipeline.model,
                    self.pipeline.process,
                    seeds=range(self.seed + start, self.seed + stop),
                    batch_size=self.batch_size,
                    config=self.config,
                    on_step=lambda step: bar.update(len(step.x)),
                    **conditions,
                )
                yield self.pipeline.decode(x.cpu())

    def conditions(self, start: int, stop: int) -> Conditions:
        """Return the conditions of the samples from `start` to `stop`."""
        if self.names == ["class_labels"]:
            assert self.labels is not None
            return Conditions(class_labels=self.labels[start:stop])
        if not self.names:
            return Conditions()
        if self.captioned:
            assert self.data.captions is not None
            return self.pipeline.encode_captions([self.data.captions[i] for i in self.items[start:stop].tolist()])
        return Conditions.stack([self.data[i] for i in self.items[start:stop].tolist()], self.names)


def check_captioned(pipeline: Pipeline, data: ImageDataset) -> None:
    """Raise ValueError unless a published pipeline draws from captions alone, and the data have them."""
    assert pipeline.published is not None
    if pipeline.published.task != "generation":
        raise ValueError(
            f"{pipeline.path}, a {pipeline.published.name}, edits images; samples of captions are measured"
        )
    if not data.captions:
        raise ValueError(f"{pipeline.path} draws from captions, which the data do not have; give data with captions")


def affordable_samples(run: Run | Pipeline, data: ImageDataset, seconds: float, **options: Any) -> int:
    """Return how many samples can be made in about these seconds, of 64 to 10,000; `options` are `GeneratedSamples`'s.

    Raises:
        ValueError, OSError: see `GeneratedSamples`.
    """
    config = options.pop("config")
    few = config.num_inference_steps if run.process.distillation else min(2, config.num_inference_steps)
    short = replace(config, num_inference_steps=few)
    trial = GeneratedSamples(run, data, TRIAL_SIZE, config=short, **options | {"batch_size": TRIAL_SIZE})
    taken = _time_second(lambda: list(trial)) / TRIAL_SIZE * config.num_inference_steps / short.num_inference_steps
    return round_down(seconds / taken, 64)


def affordable_images(extractor: Extractor, data: ImageDataset, seconds: float) -> int:
    """Return of how many images features can be computed in about these seconds, of 500 to 10,000."""
    images = stack_images(data, np.resize(np.arange(len(data)), TRIAL_SIZE))
    return round_down(seconds / (_time_second(lambda: extractor(images)) / TRIAL_SIZE), 500)


def _time_second(work: Callable[[], object]) -> float:
    """Return the seconds that work takes the second time; the first one has costs of its own."""
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def round_down(count: float, least: int) -> int:
    """Return a count of two digits that are not 0, from `least` to 10,000."""
    whole = min(10_000, max(least, int(count)))
    digit = 10 ** (len(str(whole)) - 2)
    return whole // digit * digit


class SampleFiles:
    """Samples in .npz files, in the order of their names, as `sample` writes many; one file is in memory at a time.

    Args:
        paths: files with `images` (N, H, W[, C]) of 0 to 255, and perhaps `labels` (N,).
        like: data of the same size and channels.

    Raises:
        ValueError: files of another size, or fewer samples than the folder's settings.json says.
    """

    def __init__(self, paths: Sequence[Path], like: ImageDataset) -> None:
        self.paths, self.count = paths, 0
        labels: list[Tensor] = []
        expected = (like.channels, *like.image_size)
        for path in paths:
            part = load_npz(path, DataConfig(str(path)))
            if (shape := (part.channels, *part.image_size)) != expected:
                raise ValueError(f"samples={path} are of shape {shape}, the data {expected}")
            self.count += len(part)
            labels += [] if part.labels is None else [part.labels]
        self.labels = torch.cat(labels) if len(labels) == len(paths) else None
        settings = paths[0].with_name("settings.json")
        total = read_json(settings).get("num_images", self.count) if settings.is_file() else self.count
        if self.count != total:
            raise ValueError(f"samples={paths[0].parent} has {self.count:,} of its {total:,} samples; finish it first")

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        with progress_bar(self.count, "features of samples") as bar:
            for path in self.paths:
                part = load_npz(path, DataConfig(str(path)))
                yield from image_batches(part, np.arange(len(part)))
                bar.update(len(part))


def read_samples(source: Path, like: ImageDataset) -> ImageDataset | SampleFiles:
    """Read samples of the data's size: a folder of images (sub-folders: its classes) or .npz files, an .npz or .npy.

    Raises:
        ValueError: images of another size. Nothing is scaled, since that would change the figures.
    """
    if paths := sorted(source.glob("*.npz")):
        return SampleFiles(paths, like)
    channels = like.channels if source.is_dir() else None  # arrays are not converted
    data = _check_indexed(load_data(str(source), channels=channels), "samples")
    size = tuple(data.image_size)
    if isinstance(data, EncodedImages):
        width, height = open_image(str(data.source(0))).size
        size = (height, width)
        if size == tuple(like.image_size) != tuple(data.image_size):  # the default size of large images is smaller
            data = _check_indexed(load_data(str(source), channels=channels, image_size=size), "samples")
    if size != tuple(like.image_size):
        raise ValueError(f"samples={source} are of size {size}, the data of {tuple(like.image_size)}")
    if data.labels is not None and data.class_names is not None:
        names = like.class_names or []
        is_known = set(data.class_names) <= set(names)
        data.labels = torch.tensor([names.index(n) for n in data.class_names])[data.labels] if is_known else None
    return data


def load_compared_data(
    run: Run | Pipeline | None, source: str | None, held_out: str | None, held_out_split: str | None
) -> tuple[DataConfig, ImageDataset, ImageDataset | None]:
    """Load the training images, with their configuration, and the held-out ones, both as the run would read them.

    Args:
        source: of the training images (default: the run's).
        held_out, held_out_split: another source, or a split of this one, that has the held-out images; or None.

    Raises:
        ValueError, OSError: data that are missing or cannot be compared.
    """
    if held_out is not None and held_out_split is not None:
        raise ValueError("held_out and held_out_split: give one of them")
    config = DataConfig(source or "") if run is None else replace(run.data, source=source or run.data.source)
    if run is not None and source is None:
        check_places(config, f"{run.path}: its", ["source"])
    if isinstance(run, Pipeline):
        if source is None:
            raise ValueError(f"{run.path} does not know its training data; give data, the images to compare with")
        config = replace(config, class_names=None, text_encoder=None)  # it encodes captions itself
    images = _load_images(config, "data")
    if held_out is None and held_out_split is None:
        return config, images, None
    unseen = replace(config, image_size=images.image_size, class_names=tuple(images.class_names or ()) or None)
    unseen = replace(unseen, source=held_out or config.source, split=held_out_split or config.split)
    return config, images, _load_images(unseen, "held_out")


def load_conditioned_data(config: DataConfig, images: ImageDataset) -> ImageDataset:
    """Load the data that a run's conditions are taken from: `images` themselves, or with captions and `concat`."""
    if config.text_encoder is None and config.concat is None:
        return images
    return _check_indexed(load_data(replace(config, horizontal_flip=False, aspect_buckets=False)), "data")


def _load_images(config: DataConfig, name: str) -> ImageDataset:
    """Load the images alone, all of one size: no latents and no encoded captions."""
    options = {"horizontal_flip": False, "aspect_buckets": False, "cache_images": False}
    return _check_indexed(load_data(without_wrappers(config), **options), name)


def _check_indexed(data: ImageDataset | StreamDataset, name: str) -> ImageDataset:
    if isinstance(data, StreamDataset):
        raise ValueError(f"{name} is a stream, which has no order to compare in; give data without streaming")
    return data


def proportional_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return labels (count,) with each class's share as in the data, to one sample, in a random order."""
    positions = ((np.arange(count) + 0.5) / count * len(labels)).astype(np.int64)
    order = np.random.default_rng(seed).permutation(count)
    return labels.sort().values[torch.from_numpy(positions)][torch.from_numpy(order)]
