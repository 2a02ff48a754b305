"""The options of a `UNet`: its architecture."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from unet_denoiser.config.base import as_plain, halve, per_axis

# each condition that can be dropped, and the option that builds a network for it
CONDITIONS = {"class_labels": "num_classes", "vector": "vector_dim", "context": "context_dim"}

Convention = Literal["sines_first", "cosines_first", "projection", "text_time"]


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet`; frozen and hashable.

    "Per level" means one value for all resolution levels, or a tuple with one value for each entry of `channel_mult`.
    The resolution of a level is `image_size`, halved once per level above it and rounded up.

    Args:
        in_channels: channels of the noisy input, including those concatenated to it.
        model_channels: width that `channel_mult` multiplies, >= 2; also the width of the sinusoidal time embedding.
        out_channels: channels of the prediction (twice `in_channels` when a variance is learned with it).
        num_res_blocks: residual blocks per encoder level; the decoder has one more per level.
        attention_resolutions: resolutions of the levels with attention; the bottleneck always has it.
        channel_mult: width of each level in units of `model_channels`, from the finest level to the coarsest.
        num_heads: attention heads, per level; None if `head_dim` is given.
        context_dim: width of the context tokens (text) for cross-attention, or None for no cross-attention.
        image_size: size of the training images, one int or one per axis (the longest counts). It only decides which
            levels have attention: forward takes any size.
        dims: number of spatial axes: 1 (signals), 2 (images) or 3 (volumes).
        head_dim: channels per attention head, per level; needs num_heads=None.
        num_classes: number of classes to condition on, or None.
        vector_dim: width of a conditioning vector of numbers per sample, or None.
        time_cond_dim: width of an embedding that is projected and added to the sinusoids before the time MLP (the
            guidance scale of latent consistency models), or None.
        learned_null: learn an embedding for the absence of each condition, so that it can be dropped or left out.
        attention: "plain" (self-attention, then cross-attention) or "transformer" (the spatial transformer of
            Stable Diffusion).
        transformer_depth: transformer blocks in each spatial transformer, per level; with attention="transformer".
        only_cross_attention: the transformer's first attention attends to the context, not to the features; per level.
        modulation: how residual blocks use the time embedding: "add", or "scale_shift" (norm, then * (1 + scale) +
            shift).
        stem_channels: channels after the input convolution, or None for `model_channels`.
        downsample: "conv" (stride 2), "conv_asymmetric" (pads right and bottom only), "avgpool" or "resblock".
        upsample: "conv_transpose", "nearest" (nearest, then conv) or "resblock".
        norm_groups: maximum of groups of each GroupNorm; it has the largest number that divides its width.
        norm_eps: epsilon of each GroupNorm.
        dropout: dropout probability inside the residual blocks, in [0, 1).
        time_frequencies: spacing of the sinusoids: "endpoint" (the last is 1/10000; DDPM) or "half" (ADM, SD).
        conventions: how the checkpoint that the weights come from differs from others. No output depends on it; LoRAs
            and exports do. "sines_first" or "cosines_first": the order of its sinusoids, if not the one that goes with
            `time_frequencies`. "projection" or "text_time": diffusers' kind of vector, if its width does not tell.

    Raises:
        ValueError, TypeError: an option that cannot work, with its name, its value and a valid one.
    """

    in_channels: int = 3
    model_channels: int = 128
    out_channels: int = 3
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8)
    channel_mult: tuple[float, ...] = (1, 2, 4, 8)
    num_heads: int | tuple[int, ...] | None = 8
    context_dim: int | None = 768
    _: KW_ONLY
    image_size: int | tuple[int, ...] = 64
    dims: Literal[1, 2, 3] = 2
    head_dim: int | tuple[int, ...] | None = None
    num_classes: int | None = None
    vector_dim: int | None = None
    time_cond_dim: int | None = None
    learned_null: bool = True
    attention: Literal["plain", "transformer"] = "plain"
    transformer_depth: int | tuple[int, ...] = 1
    only_cross_attention: bool | tuple[bool, ...] = False
    modulation: Literal["add", "scale_shift"] = "add"
    stem_channels: int | None = None
    downsample: Literal["conv", "conv_asymmetric", "avgpool", "resblock"] = "conv"
    upsample: Literal["conv_transpose", "nearest", "resblock"] = "conv_transpose"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.1
    time_frequencies: Literal["endpoint", "half"] = "endpoint"
    conventions: tuple[Convention, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # JSON has lists, numpy scalars and arrays
            value = as_plain(getattr(self, field.name))
            value = tuple(map(as_plain, value)) if isinstance(value, list | tuple) else value
            object.__setattr__(self, field.name, value)
        self._check_values()
        mults = tuple(int(m) if m == int(m) else m for m in self.channel_mult)
        object.__setattr__(self, "channel_mult", mults)
        self._check_levels()
        self._check_heads()

    @property
    def conditions(self) -> tuple[str, ...]:
        """Return the names in `CONDITIONS` that the network is built for."""
        return tuple(name for name, option in CONDITIONS.items() if getattr(self, option) is not None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Return `image_size` as one int per axis."""
        return per_axis(self.image_size, self.dims)

    @property
    def time_dim(self) -> int:
        """Return the width of the time embedding after its MLP."""
        return 4 * self.model_channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Return the channels of each resolution level."""
        return tuple(round(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Return the resolution of each level, of the longest axis."""
        return tuple(halve(max(self.sizes), level) for level in range(len(self.channel_mult)))

    def has_attention(self, level: int) -> bool:
        """Return True if attention follows each residual block of `level`."""
        return self.resolutions[level] in self.attention_resolutions

    def heads(self, level: int) -> int:
        """Return the number of attention heads of `level`; the bottleneck has those of the last level."""
        if self.head_dim is not None:
            return self.widths[level] // _at(self.head_dim, level)
        return _at(self.num_heads, level)

    @property
    def stem_width(self) -> int:
        """Return the channels after the input convolution."""
        return self.model_channels if self.stem_channels is None else self.stem_channels

    def depth(self, level: int) -> int:
        """Return the transformer blocks in each spatial transformer of `level`; the bottleneck is as the last level."""
        return _at(self.transformer_depth, level)

    def cross_only(self, level: int) -> bool:
        """Return True if the transformers of `level` have no self-attention; the bottleneck is as the last level."""
        return bool(_at(self.only_cross_attention, level))

    @property
    def cosines_first(self) -> bool:
        """Return True if the sinusoids of the checkpoint that the weights come from are cosines, then sines."""
        usual = self.time_frequencies == "half"
        return "cosines_first" in self.conventions or (usual and "sines_first" not in self.conventions)

    @property
    def is_vector_projected(self) -> bool:
        """Return True if the vector is diffusers' class_embed_type "projection", False for SDXL's "text_time"."""
        # SDXL's has 1536 numbers for the sizes, and more for the text; unCLIP's has 1536 or 2048
        usual = self.vector_dim is not None and (self.vector_dim <= 1536 or self.vector_dim == 2048)
        return "projection" in self.conventions or (usual and "text_time" not in self.conventions)

    @property
    def skip_levels(self) -> tuple[tuple[int, int], ...]:
        """Return (resolution level, channels) of each skip connection, in the order in which the encoder makes them."""
        skips, last = [(0, self.stem_width)], len(self.widths) - 1
        for level, width in enumerate(self.widths):
            skips += [(level, width)] * self.num_res_blocks + [(level + 1, width)] * (level < last)
        return tuple(skips)

    def to_dict(self) -> dict[str, Any]:
        """Return all options as values for JSON; tuples become lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Build from the output of `to_dict`; missing options take their defaults, unknown ones raise ValueError."""
        if not isinstance(options, Mapping):
            raise TypeError(f"the U-Net's options are {options!r}; they must be an object of names and values")
        known = {field.name for field in fields(cls)}
        if other := options.get("_class_name") or options.get("architectures"):
            raise ValueError(f"this is the configuration of {other}, not of this library's U-Net")
        if unknown := sorted(set(options) - known):
            raise ValueError(f"unknown U-Net option {unknown[0]!r}; the options are {', '.join(sorted(known))}")
        return cls(**options)

    def _check_values(self) -> None:
        """Check the type and range of each option by itself."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                value, choices = getattr(self, name), get_args(hint)
                if value not in choices or type(value) is not type(choices[0]):
                    raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        _check_int("model_channels", self.model_channels, 2)
        for name in ("in_channels", "out_channels", "num_res_blocks", "norm_groups"):
            _check_int(name, getattr(self, name), 1)
        for name in ("num_classes", "vector_dim", "context_dim", "time_cond_dim", "stem_channels"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1, " or None")
        if not isinstance(self.learned_null, bool):
            raise TypeError(f"learned_null={self.learned_null!r} must be True or False")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be a probability in [0, 1), for example 0.1")
        if not _is_number(self.norm_eps) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps={self.norm_eps!r} must be a small positive number, for example 1e-5")
        for name in ("attention_resolutions", "channel_mult", "conventions"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name}={getattr(self, name)!r} must be a tuple or list, for example (1, 2)")
        for resolution in self.attention_resolutions:
            _check_int("attention_resolutions", resolution, 1)
        if not all(convention in get_args(Convention) for convention in self.conventions):
            raise ValueError(f"conventions={self.conventions}: each must be one of {', '.join(get_args(Convention))}")
        if not self.channel_mult:
            raise ValueError("channel_mult=() needs one entry per level, for example (1, 2, 4, 8)")
        for mult in self.channel_mult:
            width = mult * self.model_channels if _is_number(mult) else 0
            # the rounded ratio of two widths, such as 120 / 88, does not give them back exactly
            if not 1 <= round(width, 6) < math.inf or not math.isclose(width, round(width), rel_tol=1e-9):
                raise ValueError(
                    f"channel_mult={self.channel_mult} gives a level {mult!r} x model_channels={self.model_channels} "
                    "channels; each must be a whole number of at least 1, for example (1, 2, 4, 8)"
                )

    def _check_levels(self) -> None:
        """Check the options with one value per axis or level."""
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * self.dims
        if len(sizes) != self.dims:
            raise ValueError(f"image_size={self.image_size} has {len(sizes)} axes, not dims={self.dims}; give one int")
        for size in sizes:
            _check_int("image_size", size, 1)
        levels = len(self.channel_mult)
        for name, low in (("num_heads", 1), ("head_dim", 1), ("transformer_depth", 0)):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{name}={value} has {len(value)} entries for {levels} levels: give one int or one each"
                )
            for entry in value if isinstance(value, tuple) else (value,):
                if value is not None:
                    _check_int(name, entry, low)
        cross = self.only_cross_attention
        if isinstance(cross, tuple) and len(cross) != levels:
            raise ValueError(f"only_cross_attention={cross} has {len(cross)} entries, but there are {levels} levels")
        if not all(isinstance(entry, bool) for entry in (cross if isinstance(cross, tuple) else (cross,))):
            raise TypeError(f"only_cross_attention={cross!r} must be True or False, or one of them per level")
        if cross and (self.attention == "plain" or self.context_dim is None):
            raise ValueError(f"only_cross_attention={cross} needs attention='transformer' and a context_dim")
        if self.attention == "plain" and self.transformer_depth != 1:
            raise ValueError(
                f"transformer_depth={self.transformer_depth} needs attention='transformer'; else leave it at 1"
            )
        if self.attention_resolutions and not any(map(self.has_attention, range(levels))):
            warnings.warn(
                f"attention_resolutions={self.attention_resolutions} match no level: image_size={self.image_size} has "
                f"levels of {self.resolutions}, so only the bottleneck has attention; () says so without a warning",
                stacklevel=5,
            )
        if self.modulation == "add" and min(self.widths) <= self.norm_groups:
            # the embedding adds a constant to a whole channel, which a norm over that channel alone subtracts again
            warnings.warn(
                f"norm_groups={self.norm_groups} leaves one channel per group at {min(self.widths)} channels, "
                "where the time and class embeddings then have no effect (modulation='add'); "
                f"give norm_groups={max(1, min(self.widths) // 4)}, for example",
                stacklevel=5,
            )

    def _check_heads(self) -> None:
        """Check that the heads divide the width of each level with attention; the bottleneck is as the last level."""
        if (self.num_heads is None) == (self.head_dim is None):
            raise ValueError(
                f"num_heads={self.num_heads} and head_dim={self.head_dim}: give exactly one of them, "
                "for example num_heads=8, or num_heads=None and head_dim=64"
            )
        name = "num_heads" if self.head_dim is None else "head_dim"
        last = len(self.widths) - 1
        for level in [i for i in range(last) if self.has_attention(i)] + [last]:
            width, value = self.widths[level], _at(getattr(self, name), level)
            if width % value:
                valid = ", ".join(str(d) for d in range(1, width + 1) if width % d == 0)
                raise ValueError(f"{name}={value} does not divide level {level}'s {width} channels; valid: {valid}")
            if self.depth(level) < 1:
                raise ValueError(
                    f"transformer_depth={self.transformer_depth} is 0 at level {level}, which has attention; give >= 1"
                )


def _at(value: Any, level: int) -> int:
    return value[level] if isinstance(value, tuple) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, alternative: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} must be an int of at least {low}{alternative}")
    if value < low:
        raise ValueError(f"{name}={value!r} must be at least {low}{alternative}")
