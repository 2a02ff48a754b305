"""A trained network with all that its samples need: class names, captions and images in, images out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.data.load import load_autoencoder, load_text_encoder
from unet_denoiser.diffusion.process import SCHEDULER_NAME, Diffusion
from unet_denoiser.models.conditions import Conditions, join_text_and_sizes
from unet_denoiser.models.fetch import fetch_model, fetch_pipeline
from unet_denoiser.models.layers.rules import prepare_to_sample
from unet_denoiser.models.unet import UNet
from unet_denoiser.sampling.pipeline.published import HELD, Published, load_published
from unet_denoiser.sampling.pipeline.read_images import read_concat, read_image, read_mask
from unet_denoiser.utils.files import read_json
from unet_denoiser.utils.images import MODES, save_grid

if TYPE_CHECKING:
    from unet_denoiser.models.autoencoder import Autoencoder
    from unet_denoiser.models.text_encoder import Prompt

CLASS_NAMES, DATA_NAME = "class_names.json", "data.json"
# fields of `DataConfig` that data.json tells of a shared model; other models are described by their networks alone
SAMPLING_FIELDS = (
    *("image_size", "channels", "resize_mode", "background", "concat"),
    *("text_encoder", "caption_length", "vae", "latent_mean", "latent_std"),
)


def find_scheduler_config(folder: Path) -> dict[str, Any] | None:
    """Read the `scheduler_config.json` of a model: in its folder, or in a folder `scheduler` beside it (diffusers)."""
    files = [folder / SCHEDULER_NAME, folder.parent / "scheduler" / SCHEDULER_NAME]
    return next((read_json(file) for file in files if file.is_file()), None)


def _read_data(folder: Path) -> dict[str, Any]:
    """Read the data.json of a shared model, its places as paths; {} without one, ValueError for an unknown field."""
    path = folder / DATA_NAME
    data = read_json(path) if path.is_file() else {}
    if unknown := [name for name in data if name not in SAMPLING_FIELDS]:
        raise ValueError(f"{path} has {unknown[0]!r}; valid are {', '.join(SAMPLING_FIELDS)}")
    places = {name: data.get(name) for name in ("text_encoder", "vae")}
    return data | {name: str(folder / value) for name, value in places.items() if value and (folder / value).is_dir()}


@dataclass(frozen=True)
class Pipeline:
    """A network with its process and the description of its data; `Run.load_pipeline` makes one.

    Args:
        path: the directory it was loaded from, for messages.
        model: samples are made on its device.
        data: size, channels, class names, text encoder and VAE that it was trained on.
        published: what a published pipeline has beside these; None for others.
    """

    path: Path
    model: UNet
    process: Diffusion
    data: DataConfig
    published: Published | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Pipeline:
        """Load a published pipeline, or a saved model.

        A pipeline is a folder that diffusers wrote or its name on the hub. A model is a folder such as RUN/model, or a
        U-Net folder of diffusers with the folder `scheduler` beside it, or what `share` wrote, here or on the hub; its
        classes are named by their numbers, unless the folder has a class_names.json. FileNotFoundError or ValueError if
        there is no readable network or schedule.
        """
        if (pipeline := fetch_pipeline(folder)) is not None:
            loaded = load_published(pipeline, device)
            return cls(pipeline, prepare_to_sample(loaded.model), *loaded[1:])
        folder = fetch_model(folder)
        model, schedule = UNet.from_pretrained(folder), find_scheduler_config(folder)
        if schedule is None:
            advice = f"write one with Diffusion(...).save_pretrained({str(folder)!r})"
            raise FileNotFoundError(f"{folder} has no {SCHEDULER_NAME}, nor a folder scheduler beside it; {advice}")
        process, names = Diffusion.from_dict(schedule), folder / CLASS_NAMES
        found = json.loads(names.read_text("utf-8")) if names.is_file() else range(model.config.num_classes or 0)
        classes, channels = tuple(map(str, found)) or None, process.data_channels(model.config)
        known = {"image_size": model.config.sizes, "channels": channels} | _read_data(folder)
        data = DataConfig.from_dict(known | {"source": str(folder), "class_names": classes})
        return cls(folder, prepare_to_sample(model.to(device)), process, data)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order, or None if the network has no classes."""
        return list(self.data.class_names) if self.model.config.num_classes and self.data.class_names else None

    def sampling_config(self, **options: Any) -> SamplingConfig:
        """Return a configuration, by default with the steps and guidance of a distilled or published network."""
        if self.published is None:
            return SamplingConfig(**self.process.sampling_defaults | options)
        defaults: dict[str, Any] = dict(HELD[self.published.name][1])
        spacing = self.process.scheduler.config.timestep_spacing
        is_cut = spacing == "leading" and not self.process.alphas[-1] > 0  # would leave out the pure noise
        defaults |= {} if is_cut or options.get("sigma_schedule") else {"timestep_spacing": spacing}
        return SamplingConfig(**defaults | options)

    def labels(self, count: int, names: Sequence[str] = ()) -> Tensor:
        """Return (count,) labels that repeat the classes `names` (default: all) in turn; ValueError if unknown."""
        if self.class_names is None:
            raise ValueError(f"class={names[0] if names else None!r}: {self.path} was trained without classes")
        if unknown := [name for name in names if name not in self.class_names]:
            raise ValueError(f"class={unknown[0]!r} is not one of {', '.join(self.class_names)}")
        labels = [self.class_names.index(name) for name in names or self.class_names]
        return torch.tensor([labels[i % len(labels)] for i in range(count)])

    def encode_captions(
        self, captions: Sequence[str], image_size: Sequence[int] | None = None, *, negative: bool = False
    ) -> Conditions:
        """Return the conditions of captions; ValueError if the network was trained without them.

        Args:
            image_size: of the images in pixels, which SDXL is given too (default: the pipeline's).
            negative: the captions are those to lead away from.
        """
        if self.data.text_encoder is None:
            raise ValueError(f"caption={captions[0]!r}: {self.path} was trained without captions (text_encoder)")
        from unet_denoiser.models.prompt_encoder import PromptEncoder
        from unet_denoiser.models.text_encoder import pad_tokens

        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._prompts]:
            name, length = self.data.text_encoder, self.data.caption_length
            encoder = load_text_encoder(self.data) if self.published is None else PromptEncoder(name, length)
            self._prompts.update(zip(new, encoder.encode(new), strict=True))
            encoder.warn_cut(encoder.num_cut, len(new))
        prompts = [self._prompts[caption] for caption in captions]
        context, mask = pad_tokens([prompt.tokens for prompt in prompts])
        if self.published is None:
            return Conditions(context=context, context_mask=mask)
        pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        vector = self._vector(torch.stack(pooled), image_size, negative) if pooled else None
        return Conditions(context=context, vector=vector)

    def encode_absence(self, conditions: Conditions, image_size: Sequence[int] | None = None) -> Conditions:
        """Return what guidance leads away from where nothing else is given.

        It is the empty caption, or SDXL's zeros; and nothing if the network has learned a null.
        """
        if conditions.context is None or self.model.config.learned_null or self.data.text_encoder is None:
            return Conditions()
        absent, pooled = self.encode_captions([""], image_size, negative=True), self._prompts[""].pooled
        if pooled is None or absent.context is None or self.published is None or not self.published.zero_negative:
            return absent
        vector = self._vector(torch.zeros_like(pooled)[None], image_size, negative=True)
        return Conditions(context=torch.zeros_like(absent.context), vector=vector)

    def _vector(self, pooled: Tensor, image_size: Sequence[int] | None, negative: bool) -> Tensor:
        """Return SDXL's vector (B, vector_dim) of pooled text (B, D) and sizes."""
        assert self.published is not None
        size: Any = self._check_size(image_size) or self.data.image_size
        numbers = torch.tensor(self.published.numbers(size, negative=negative), dtype=torch.float32)
        return join_text_and_sizes(self.model.config, pooled, numbers.expand(len(pooled), -1))

    @cached_property
    def _prompts(self) -> dict[str, Prompt]:
        """The captions encoded so far; the encoder, which may be large, is not kept."""
        return {}

    def read_image(self, image: str | Path, size: Sequence[int] | None = None, *, keep_size: bool = False) -> Tensor:
        """Read an image file as (1, C, H, W) in [-1, 1], resized and cropped as in training.

        ValueError or OSError if the file is no image, or the network makes none.

        Args:
            size: in pixels, one number or height and width (default: that of the training).
            keep_size: keep the size of the file instead.
        """
        if not self.makes_images:
            raise ValueError(f"image={image}: {self.path} makes no images")
        sizes: Any = None if keep_size else self._check_size(size) or self.data.image_size
        return read_image(self.data, self.image_channels, image, sizes)

    def read_concat(self, image: Path) -> Tensor:
        """Read an image file as `concat` (1, C2, *spatial) of a sample; ValueError if the network sees no image."""
        latent = self.data.vae is not None
        channels = self.image_channels if latent else self.process.concat_channels(self.model.config)
        return self.encode(read_concat(self.data, channels, image))

    def read_mask(self, mask: str | Path, size: Sequence[int]) -> Tensor:
        """Read a mask file as (1, 1, H, W) bool, True where it is white, framed as images are."""
        return read_mask(self.data, mask, size)

    def encode(self, images: Tensor) -> Tensor:
        """Turn images (B, C, H, W) into samples: latents, or the images themselves if there is no VAE."""
        return images if self.data.vae is None else self.autoencoder.encode(images)

    def decode(self, x: Tensor) -> Tensor:
        """Turn samples into images; without a VAE they are that already, and of a published pipeline clipped."""
        if self.data.vae is None:
            return x if self.published is None else x.clamp(-1, 1)
        return self.autoencoder.decode(x)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The autoencoder that `data.vae` names."""
        return load_autoencoder(self.data)

    @property
    def latent_factor(self) -> int:
        """Pixels along an axis for each value of a sample: 1, except for latents."""
        return 1 if self.data.vae is None else self.autoencoder.factor

    @property
    def image_channels(self) -> int:
        """Channels of the images that `decode` returns."""
        latent = self.data.vae is not None
        return self.autoencoder.image_channels if latent else self.process.data_channels(self.model.config)

    @property
    def image_range(self) -> tuple[float, float] | None:
        """Range of the values that `decode` returns; None for unbounded data."""
        return self.process.data_range if self.data.vae is None and self.published is None else (-1.0, 1.0)

    @property
    def makes_images(self) -> bool:
        """True if a PNG can hold what `decode` returns."""
        return self.model.config.dims == 2 and self.image_channels in MODES

    def sample_size(self, pixels: Sequence[int] | None) -> tuple[int, ...] | None:
        """Convert a size in pixels to `image_size` for `sample`; ValueError if no latents have that size."""
        size = self._check_size(pixels)
        return size if size is None else tuple(n // self.latent_factor for n in size)

    def _check_size(self, size: Sequence[int] | None) -> tuple[int, ...] | None:
        """Return a size in pixels, one int per axis; ValueError if no samples have that size."""
        if size is None:
            return None
        dims, factor = self.model.config.dims, self.latent_factor
        size = tuple(size) * (dims if len(size) == 1 else 1)
        if any(n < 1 or n % factor for n in size) or len(size) != dims:
            multiples = f" multiples of {factor}" if factor > 1 else ""
            raise ValueError(f"image_size={size} must be 1 or {dims} positive numbers{multiples}")
        return size

    def save_grid(self, images: Tensor, path: Path, names: Sequence[str] = (), columns: int | None = None) -> Path:
        """Save images (N, C, H, W) in one PNG, one named row per class or caption; in a square if there are neither.

        `names` are the classes or captions, in turn (default: all classes). With `columns` images are in order.
        """
        if columns is not None or (not names and self.class_names is None):
            return save_grid(images, path, columns, self.image_range)
        names = list(names or self.class_names or [])[: len(images)]
        columns = max(1, -(-len(images) // len(names)))
        grey = float(images.min()) if self.image_range is None else sum(self.image_range) / 2  # as between the images
        blank = torch.full_like(images[:1], grey)
        rows = [images[i :: len(names)] for i in range(len(names))]
        by_class = torch.cat([part for row in rows for part in (row, *[blank] * (columns - len(row)))])
        return save_grid(by_class, path, columns, self.image_range, names)
