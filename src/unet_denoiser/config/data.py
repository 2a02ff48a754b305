"""What a network is trained on, as data: every option once, checked when it is built. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from unet_denoiser.config.base import check_choice

ResizeMode = Literal["center_crop", "random_crop", "pad", "stretch"]
OnBad = Literal["raise", "skip"]


class ConcatKind(NamedTuple):
    """The condition that `DataConfig.concat` names: the kind, and the factor or the folder that belongs to it."""

    name: Literal["downscaled", "inpainting", "folder"]
    factor: int = 1
    folder: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """What a network is trained on.

    Args:
        source: "digits"; a folder of images; an .npz or .npy of images (N, H, W[, C]), uint8, uint16 or floats in
            [-1, 1]; a .parquet file or a folder of them; or "hf:NAME" or "hf:NAME:SUBSET" for a Hugging Face data set.
        image_size: resize to this, one int or height and width (default: that of most images up to 64, else 64).
        channels: convert to this number: 1 (grey), 3 (RGB) or 4 (RGBA) for image files (default: what they have).
        class_names: names of the classes in label order (default: those found).
        split: of a Hugging Face data set.
        image_column: of Parquet and Hugging Face data sets (default: the first that holds images).
        label_column: the class, a name or an integer from 0, also in metadata.csv (default: "label" if there is one).
        caption_column: also in metadata.csv (default: "text", "caption", "captions" or "prompt" if there is one).
        vector_columns: numbers that condition the network, also in metadata.csv; taken as they are, so that values of
            about unit size are best.
        resize_mode: how images get the size: "center_crop" or "random_crop" (scaled to cover it, then cut), "pad"
            (scaled to fit into it) or "stretch".
        horizontal_flip: flip half of the images, at random.
        aspect_buckets: keep each image's aspect ratio up to 1:2, by batches of one shape each with as many pixels as
            image_size; sides are multiples of an eighth of it, at least of 8.
        background: colour that transparent images are laid on and "pad" fills with: a name or "#rrggbb".
        on_bad: what to do with files that cannot be used: "raise" names them, "skip" leaves them out.
        streaming: read Parquet or Hugging Face data sets from first to last instead of holding them on a disk.
        shuffle_buffer: images held at a time to shuffle a stream.
        cache_images: keep the decoded, scaled images in memory.
        text_encoder: folder or hub name of a transformers text encoder (CLIP's, T5's, BERT and its like); the data's
            captions then are a condition, as its tokens. They are kept on disk.
        caption_length: longest caption in tokens, longer ones are cut (default: what the tokenizer states).
        vae: folder or hub name of an AutoencoderKL or AutoencoderTiny of diffusers; the network then is trained on its
            latents, which are kept on disk, and samples are decoded.
        standardize_latents: measure mean and standard deviation of each channel of the latents and scale by them,
            instead of by what the vae's configuration states.
        latent_mean: the measured means (default: measured when needed).
        latent_std: the measured standard deviations, likewise.
        concat: a picture that the network sees beside the noisy one: "downscaled:4" (the picture at a quarter of its
            size, enlarged again: super-resolution), "inpainting" (a random mask, and the picture without what is
            masked), or a folder with a picture of the same name for each one of the data (image to image).

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
        check_choice("resize_mode", self.resize_mode, ResizeMode)
        check_choice("on_bad", self.on_bad, OnBad)
        if not self.source:
            raise ValueError("source='' names no data; give 'digits', a folder or a file")
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size or 1,)
        if self.image_size == 0 or not sizes or min(sizes) < 1:
            raise ValueError(f"image_size={self.image_size} must be positive")
        for name in ("channels", "shuffle_buffer"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, reason in (("aspect_buckets", "sizes are not known before"), ("cache_images", "it may not fit")):
            if self.streaming and getattr(self, name):
                raise ValueError(f"{name}=True with streaming=True: {reason}; give one of them")
        self._check_conditions()

    def _check_conditions(self) -> None:
        for name in ("text_encoder", "vae", "concat"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}='' names nothing; give a path, or leave it out")
        for name, needs in (("caption_length", "text_encoder"), ("standardize_latents", "vae"), ("latent_mean", "vae")):
            if getattr(self, name) and getattr(self, needs) is None:
                raise ValueError(f"{name}={getattr(self, name)} needs {needs}, which is not given")
        if self.caption_length is not None and self.caption_length < 1:
            raise ValueError(f"caption_length={self.caption_length} must be at least 1")
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
    def from_dict(cls, options: Mapping[str, Any]) -> DataConfig:
        """The inverse of `dataclasses.asdict`, from JSON too; an unknown option raises ValueError."""
        if unknown := sorted(set(options) - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown option of the data {unknown[0]!r}")
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return cls(**values)


# what a resumed run may change; leaving out files that broke since then changes the order of what is to come
DATA_CHANGEABLE = frozenset({"cache_images", "on_bad"})
