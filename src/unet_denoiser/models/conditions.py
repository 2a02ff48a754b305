"""The conditions of a batch as one record: the arguments of a network beside x_t and t."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from unet_denoiser.config.unet import UNetConfig
from unet_denoiser.convert.state_dict import swap_halves
from unet_denoiser.models.layers.embeddings import SinusoidalPosEmb


@dataclass(frozen=True)
class Conditions:
    """Conditions of B samples; an absent one is None.

    Args:
        class_labels: (B,) integers, or (B, num_classes) weights of the classes.
        vector: (B, vector_dim).
        context: (B, S, context_dim) tokens for cross-attention.
        context_mask: (B, S) bool, False at padding; it belongs to `context`.
        concat: (B, C2, *spatial) channels to concatenate to x_t.
        time_cond: (B, time_cond_dim).
    """

    class_labels: Tensor | None = None
    vector: Tensor | None = None
    context: Tensor | None = None
    context_mask: Tensor | None = None
    concat: Tensor | None = None
    time_cond: Tensor | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all conditions."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def select(cls, batch: Mapping[str, Any], names: Collection[str]) -> Self:
        """Take the conditions `names` from a batch or item that may hold more; a context comes with its mask."""
        names = {*names, "context_mask"} if "context" in names else names
        return cls(**{name: batch[name] for name in cls.names() if name in names and batch.get(name) is not None})

    @classmethod
    def stack(cls, items: Sequence[Mapping[str, Any]], names: Collection[str]) -> Self:
        """Stack the conditions `names` of data items into a batch."""
        known = cls.select(items[0], names).given() if items else {}
        return cls(**{name: torch.stack([torch.as_tensor(item[name]) for item in items]) for name in known})

    def given(self) -> dict[str, Tensor]:
        """Return the conditions that are present, by name: keyword arguments of a network."""
        return {name: value for name in self.names() if (value := getattr(self, name)) is not None}

    def rows(self, rows: slice | Tensor) -> Self:
        """Return the conditions of some samples of the batch."""
        return replace(self, **{name: value[rows] for name, value in self.given().items()})

    def expand(self, count: int) -> Self:
        """Repeat the conditions of a single sample for `count` samples; leave the others as they are."""
        expanded = {n: v.expand(count, *v.shape[1:]) if len(v) == 1 else v for n, v in self.given().items()}
        return replace(self, **expanded)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move to a device, and convert floating-point conditions to `dtype` unless it is None."""
        return replace(
            self, **{n: v.to(device, dtype if v.is_floating_point() else None) for n, v in self.given().items()}
        )

    def without(self, names: Collection[str]) -> Self:
        """Remove the conditions `names`; a context goes with its mask."""
        names = {*names, "context_mask"} if "context" in names else names
        return replace(self, **dict.fromkeys(names))


def join_text_and_sizes(config: UNetConfig, pooled: Tensor, numbers: Tensor) -> Tensor:
    """Return SDXL's vector (B, vector_dim): pooled text (B, D), then each of the numbers (B, N) as cosines and sines.

    The numbers are sizes in pixels, and perhaps an aesthetic score; they share what the text leaves of `vector_dim`.
    """
    width = ((config.vector_dim or 0) - pooled.shape[1]) // numbers.shape[1]
    embedded = SinusoidalPosEmb(width, config.time_frequencies)(numbers.flatten())  # (B * N, width), sines first
    embedded = swap_halves(embedded, 1) if config.cosines_first else embedded
    return torch.cat([pooled, embedded.reshape(len(numbers), -1).to(pooled.dtype)], dim=1)
