"""Tracing a module to a program of torch.export, which all formats are made from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unet_denoiser.models.layers.rules import plain_convolutions


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Sequence[int | str]], min_size: int = 1
) -> Any:
    """Trace a module, called with inputs by position, to a `torch.export.ExportedProgram`.

    Args:
        inputs: one example for each argument.
        axes: for each input, the names of its axes that may have any length; a number is a fixed one.
        min_size: the least length of axes other than "batch" and "tokens".
    """
    names = {axis for shape in axes.values() for axis in shape if isinstance(axis, str)}
    least = {"batch": 1, "tokens": 1}
    dims = {name: torch.export.Dim(name, min=least.get(name, min_size)) for name in sorted(names)}
    shapes = tuple(
        {i: dims[axis] for i, axis in enumerate(axes[name]) if isinstance(axis, str)} or None for name in inputs
    )
    # our own kernels are no operators that a file could hold
    with torch.no_grad(), plain_convolutions():
        return torch.export.export(
            module.eval(), tuple(inputs.values()), dynamic_shapes=(shapes,) if names else None, strict=False
        )
