"""What samples of a trained network mean: classes and captions by name on their way in, pictures on their way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.data.load import load_autoencoder, load_text_encoder
from unet_denoiser.diffusion.process import Diffusion, concat_channels, data_channels
from unet_denoiser.sampling.pipeline.read_images import read_concat, read_mask, read_picture
from unet_denoiser.utils.images import MODES, save_grid


@dataclass(frozen=True)
class Pipeline:
    """A network with the data and the process that it was trained with; `Run` is one with its training.

    Args:
        path: the directory, as messages name it.
        data: what it is trained on, with size, channels and class names as they were found.
        model: the architecture.
        process: schedule, prediction type, data range.
    """

    path: Path
    data: DataConfig
    model: UNetConfig
    process: Diffusion

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order, or None for a run without classes."""
        return list(self.data.class_names) if self.model.num_classes and self.data.class_names else None

    def labels(self, count: int, names: Sequence[str] = ()) -> Tensor:
        """(count,) labels that go round the classes `names` (default: all), so that label i does not depend on count.

        Raises:
            ValueError: a run without classes, or a name it does not have.
        """
        if self.class_names is None:
            raise ValueError(f"class={names[0] if names else None!r}: {self.path} was trained without classes")
        if unknown := [name for name in names if name not in self.class_names]:
            raise ValueError(f"class={unknown[0]!r} is not one of {', '.join(self.class_names)}")
        chosen = [self.class_names.index(name) for name in names or self.class_names]
        return torch.tensor([chosen[i % len(chosen)] for i in range(count)])

    def encode_captions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`context` and `context_mask` of captions, one row each, by the text encoder that the run was trained with.

        Raises:
            ValueError: a run that was trained without captions.
        """
        if self.data.text_encoder is None:
            raise ValueError(f"caption={captions[0]!r}: {self.path} was trained without captions (text_encoder)")
        from unet_denoiser.models.text_encoder import pad_tokens

        if new := [caption for caption in dict.fromkeys(captions) if caption not in self._tokens]:
            self._tokens.update(zip(new, load_text_encoder(self.data).tokens(new), strict=True))
        context, mask = pad_tokens([self._tokens[caption] for caption in captions])
        return {"context": context, "context_mask": mask}

    @cached_property
    def _tokens(self) -> dict[str, Tensor]:
        """Those of the captions that were encoded so far; the encoder, which may be large, is not kept."""
        return {}

    def read_concat(self, image: Path) -> Tensor:
        """(1, C2, H, W) for `sample` from a picture file; see `read_images.read_concat`."""
        return read_concat(self.data, concat_channels(self.model, self.process), image)

    def read_picture(self, image: str | Path, size: Sequence[int] | None = None, *, as_it_is: bool = False) -> Tensor:
        """(1, C, H, W) of a picture file in [-1, 1], prepared as in training.

        Args:
            size: one number or height and width (default: as trained).
            as_it_is: keep the file's size.

        Raises:
            ValueError, OSError: a file that is no picture, or a run that makes none.
        """
        if not self.makes_pictures:
            raise ValueError(f"image={image}: {self.path} makes no pictures")
        return read_picture(self.data, self.picture_channels, image, self._pixels(size), as_it_is=as_it_is)

    def read_mask(self, mask: str | Path, size: Sequence[int]) -> Tensor:
        """(1, 1, H, W) bool of a picture file, True where it is white, prepared as a picture is."""
        return read_mask(self.data, mask, size)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) as the run's samples: its vae's latents, or as they are."""
        return pictures if self.data.vae is None else self._autoencoder.encode(pictures)

    def sample_size(self, pixels: Sequence[int] | None) -> tuple[int, ...] | None:
        """`image_size` for `sample` from one in pixels; ValueError where there are no such latents."""
        size = self._pixels(pixels)
        return size if size is None else tuple(n // self.latent_factor for n in size)

    def _pixels(self, size: Sequence[int] | None) -> tuple[int, ...] | None:
        if size is None:
            return None
        size = tuple(size) * (self.model.dims if len(size) == 1 else 1)
        if any(n < 1 or n % self.latent_factor for n in size) or len(size) != self.model.dims:
            multiples = f" multiples of {self.latent_factor}" if self.latent_factor > 1 else ""
            raise ValueError(f"image_size={size} must be 1 or {self.model.dims} positive numbers{multiples}")
        return size

    @cached_property
    def _autoencoder(self) -> Any:
        return load_autoencoder(self.data)

    @property
    def latent_factor(self) -> int:
        """Pixels a side for one of the samples' values: 1, but for latents."""
        return 1 if self.data.vae is None else self._autoencoder.factor

    @property
    def picture_channels(self) -> int:
        """Channels of what `decode` gives."""
        if self.data.vae is not None:
            return self._autoencoder.image_channels
        return data_channels(self.model, self.process)

    @property
    def makes_pictures(self) -> bool:
        """Whether `decode` gives what a PNG can hold."""
        return self.model.dims == 2 and self.picture_channels in MODES

    def decode(self, x: Tensor) -> Tensor:
        """Samples as pictures: decoded by the run's vae where it was trained on latents, else as they are."""
        return x if self.data.vae is None else self._autoencoder.decode(x)

    @property
    def picture_range(self) -> tuple[float, float] | None:
        """The range of what `decode` gives; None for unbounded data."""
        return self.process.data_range if self.data.vae is None else (-1.0, 1.0)

    def save_grid(self, x: Tensor, path: Path, names: Sequence[str] = (), columns: int | None = None) -> Path:
        """One picture of samples, decoded: one row per class or caption, which took turns, or else a square.

        Args:
            columns: so many a row, in order, instead.
        """
        if columns is not None or (not names and self.class_names is None):
            return save_grid(x, path, columns, self.picture_range)
        classes = len(names or self.class_names or [])
        columns = max(1, -(-len(x) // classes))
        blank = torch.full_like(x[:1], float(x.min()) if self.picture_range is None else self.picture_range[0])
        rows = [x[i::classes] for i in range(min(classes, len(x)))]
        by_class = torch.cat([part for row in rows for part in (row, *[blank] * (columns - len(row)))])
        return save_grid(by_class, path, columns, self.picture_range)
