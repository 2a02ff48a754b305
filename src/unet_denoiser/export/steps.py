"""The two parts of a network that sampling runs in an engine: all of it, or its shallow layers alone.

Time and conditions are embedded outside, in float32 and once for a whole sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from unet_denoiser.export.network import AXES
from unet_denoiser.models.layers.context import Context
from unet_denoiser.models.unet import UNet

Entry = Literal["full", "full_deep", "shallow"]  # "full_deep" returns the deep features as well


class NetworkStep(nn.Module):
    """One part of a `UNet` as a function of tensors: x, emb, tokens and mask with cross-attention, deep if shallow.

    Args:
        depth: shallow blocks of the decoder.
    """

    def __init__(self, model: UNet, entry: Entry, depth: int = 1) -> None:
        super().__init__()
        self.model, self.entry, self.depth = model, entry, depth

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(step_axes(self.model, self.entry), inputs, strict=True))
        x, emb = given["x"], given["emb"]
        context = Context(given["tokens"], given["mask"]) if "tokens" in given else None
        skips = self.model.encode_shallow(x, emb, context, self.depth)
        if self.entry == "shallow":
            return (self.model.decode_shallow(given["deep"], skips, emb, context),)
        deep = self.model.deep_features(skips[-1], emb, context, self.depth)
        out = self.model.decode_shallow(deep, skips, emb, context)
        return (out, deep) if self.entry == "full_deep" else (out,)


def step_axes(model: UNet, entry: Entry) -> dict[str, tuple[int | str, ...]]:
    """Return the shape of each input of a step, in order; a name stands for any length."""
    c = model.config
    space = AXES[c.dims]
    axes: dict[str, tuple[int | str, ...]] = {"x": ("batch", c.in_channels, *space), "emb": ("batch", c.time_dim)}
    if c.context_dim is not None:
        axes |= {"tokens": ("batch", "tokens", c.context_dim), "mask": ("batch", "tokens")}
    if entry == "shallow":
        axes["deep"] = ("batch", deep_channels(model), *space)
    return axes


def deep_channels(model: UNet) -> int:
    """Return the channels of the deep features: those that the last block of the decoder takes, less its skip's."""
    first = next(iter(model.decoder[-1].children()))
    return int(first.norm1.num_channels) - model.config.stem_width  # type: ignore[union-attr, arg-type]


def draw_step_inputs(model: UNet, entry: Entry, lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """Return inputs of a step with axes of these lengths, for tracing."""
    drawn = {}
    for name, axes in step_axes(model, entry).items():
        shape = [lengths[axis] if isinstance(axis, str) else axis for axis in axes]
        drawn[name] = torch.ones(shape, dtype=torch.bool) if name == "mask" else torch.randn(shape)
    return drawn
