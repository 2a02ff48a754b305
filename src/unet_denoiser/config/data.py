"""The options of the dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, Self

from unet_denoiser.config.base import check_minimum, check_types
from unet_denoiser.config.paths import expand_home

ResizeMode = Literal["center_crop", "random_crop", "pad", "stretch"]
OnBad = Literal["raise", "skip"]


class ConcatKind(NamedTuple):
    """The condition that `DataConfig.concat` names: the kind, and the factor or the folder that belongs to it."""

    name: Literal["downscaled", "inpainting", "folder"]
    factor: int = 1
    folder: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """The dataset: where it comes from, how images are prepared, and what conditions the network.

    Args:
        source: "digits"; a folder of images; an .npz or .npy file of images (N, H, W[, C]), uint8, uint16 or floats in
            [-1, 1]; a .parquet file or a folder of them; or "hf:NAME" or "hf:NAME:SUBSET" for a Hugging Face dataset.
        image_size: resize to this, one int or height and width (default: the most frequent size if at most 64, else
            64).
        channels: convert image files to 1 (grey), 3 (RGB) or 4 (RGBA) channels (default: as they are).
        class_names: names of the classes in label order (default: those found).
        split: split of a Hugging Face dataset, or of a folder of .parquet files whose names tell it.
        image_column: image column of a Parquet or Hugging Face dataset (default: "image", or the first that holds
            images).
        label_column: column of the class, a name or an integer from 0; also in metadata.csv (default: "label", "labels"
            or the first that a Hugging Face dataset marks as classes).
        caption_column: column of the caption; also in metadata.csv (default: "text", "caption", "captions" or "prompt"
            if there is one).
        vector_columns: columns of numbers that condition the network; also in metadata.csv. They are not normalized,
            so values of about unit size are best.
        resize_mode: how images are resized: "center_crop" or "random_crop" (scale to cover the size, then crop), "pad"
            (scale to fit into it, then pad) or "stretch".
        horizontal_flip: flip half of the images, at random.
        aspect_buckets: keep each image's aspect ratio, up to 1:2, in batches of one shape each with about as many
            pixels as image_size; sides are multiples of an eighth of it, at least of 8.
        background: colour behind transparent images and around those that "pad" fits in: a name or "#rrggbb".
        on_bad: what to do with files that cannot be used: "raise" names them, "skip" leaves them out.
        streaming: read a Parquet or Hugging Face dataset from first to last instead of storing it on disk.
        shuffle_buffer: number of images that a stream holds to shuffle them.
        cache_images: keep the decoded, resized images in memory.
        text_encoder: folder or hub name of a text encoder of transformers (CLIP, T5, BERT, ...), whose tokens of the
            captions condition the network. They are cached on disk.
        caption_length: maximum of tokens per caption; longer captions are cut (default: the tokenizer's).
        vae: folder or hub name of an AutoencoderKL or AutoencoderTiny of diffusers. The network is trained on its
            latents, which are cached on disk, and samples are decoded.
        standardize_latents: scale latents by the mean and standard deviation of each channel, measured on the dataset,
            instead of by the values in the vae's configuration.
        latent_mean: the measured means (default: measured when needed).
        latent_std: the measured standard deviations (default: measured when needed).
        concat: image to concatenate to the noisy one as a condition: "downscaled:4" (the image at a quarter of its
            size, enlarged again: super-resolution), "inpainting" (a random mask, and the image without the masked
            part), or a folder with an image of the same name for each one of the dataset (image to image).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    source: str
    image_size: int | tuple[int, ...] | None = None
    channels: int | None = None
    class_names: tuple[str, ...] | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    vector_columns: tuple[str, ...] = ()
    resize_mode: ResizeMode = "center_crop"
    horizontal_flip: bool = False
    aspect_buckets: bool = False
    background: str = "white"
    on_bad: OnBad = "raise"
    streaming: bool = False
    shuffle_buffer: int = 1000
    cache_images: bool = False
    text_encoder: str | None = None
    caption_length: int | None = None
    vae: str | None = None
    standardize_latents: bool = False
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    concat: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("source", "text_encoder", "vae", "concat"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, expand_home(value))
        if not self.source:
            raise ValueError("source='' names no data; give 'digits', a folder or a file")
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size or 1,)
        if self.image_size == 0 or not sizes or min(sizes) < 1:
            raise ValueError(f"image_size={self.image_size} must be positive")
        check_minimum(self, 1, "channels", "shuffle_buffer", "caption_length")
        for name, reason in (("aspect_buckets", "a stream's sizes are unknown"), ("cache_images", "it may not fit")):
            if self.streaming and getattr(self, name):
                raise ValueError(f"{name}=True with streaming=True: {reason}; give one of them")
        self._check_conditions()

    def _check_conditions(self) -> None:
        for name in ("text_encoder", "vae", "concat"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' is empty; give a path, or leave it out")
        for name, needs in (("caption_length", "text_encoder"), ("standardize_latents", "vae"), ("latent_mean", "vae")):
            if getattr(self, name) and getattr(self, needs) is None:
                raise ValueError(f"{name}={getattr(self, name)} needs {needs}, which is not given")
        if (self.latent_mean is None) != (self.latent_std is None):
            raise ValueError("latent_mean and latent_std belong together; give both, or neither")
        _ = self.concat_kind  # raises for a factor that cannot be used

    @property
    def concat_kind(self) -> ConcatKind | None:
        """Parse `concat`; ValueError for a factor below 2."""
        if self.concat is None:
            return None
        if self.concat == "inpainting":
            return ConcatKind("inpainting")
        if not self.concat.startswith("downscaled:"):
            return ConcatKind("folder", folder=self.concat)
        factor = self.concat.removeprefix("downscaled:")
        if not factor.isdecimal() or int(factor) < 2:
            raise ValueError(f"concat={self.concat!r} needs a whole factor of at least 2, as in 'downscaled:4'")
        return ConcatKind("downscaled", factor=int(factor))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build from the output of `dataclasses.asdict`, also from JSON; an unknown option raises ValueError."""
        if unknown := sorted(set(options) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown option of the data {unknown[0]!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return cls(**values)


# options that `--resume` may change; on_bad="skip" changes the order from there on if files broke meanwhile
DATA_CHANGEABLE = frozenset({"cache_images", "on_bad"})
# places of files, which `--resume` may change if the files moved
DATA_MOVABLE = frozenset({"source", "text_encoder", "vae", "concat"})
