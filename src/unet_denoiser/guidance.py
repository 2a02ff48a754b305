"""Guidance: what a network's outputs with and without its conditions are combined to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.inputs import CONDITIONS


def classifier_free_guidance(
    model: Callable[..., Tensor],
    guidance_scale: float,
    guided: Sequence[str] | None = None,
    *,
    guided_channels: int | None = None,
    **inputs: Tensor | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function (x_t, t) -> output that bends the network's prediction towards its conditions.

    output = unconditional + guidance_scale * (conditional - unconditional) (Ho and Salimans 2022, equation 6, with
    guidance_scale = 1 + w). At 1 it is the network itself, called once; at 0 the unconditional network, called once;
    otherwise both halves run as one batch.

    Args:
        model: called as model(x, t, **inputs), with the conditions that are to count dropped by its `drop` argument.
        guided: the conditions that the unconditional half goes without; it keeps the others (default: all).
        guided_channels: how many of the output's first channels are guided, where the others are no prediction (a
            learned variance); those are the conditional network's. All by default.
        inputs: conditions, each (B, ...); None for those that are absent. `concat` counts as one; others than those of
            `CONDITIONS` (`context_mask`) go along with them.

    Raises:
        ValueError: a scale other than 1 without any condition, or a name in `guided` that was not given.
    """
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number; 1 is off")
    given = {name: value for name, value in inputs.items() if value is not None}
    conditions = [name for name in (*CONDITIONS, "concat") if name in given]
    if unknown := [name for name in guided or () if name not in conditions]:
        raise ValueError(f"guided={unknown[0]!r} is not one of the conditions given: {', '.join(conditions) or 'none'}")
    conditions = conditions if guided is None else list(guided)
    if guidance_scale == 1:
        return partial(model, **given)
    if not conditions:
        raise ValueError(
            f"guidance_scale={guidance_scale} needs a condition ({', '.join(CONDITIONS)}); without one give 1"
        )
    if guidance_scale == 0:
        rows = len(given[conditions[0]])
        device = given[conditions[0]].device
        return partial(
            model, drop=dict.fromkeys(conditions, torch.ones(rows, dtype=torch.bool, device=device)), **given
        )
    doubled = {name: torch.cat([value, value]) for name, value in given.items()}
    return partial(_guided, model, guidance_scale, guided_channels, conditions, doubled)


def _guided(
    model: Callable[..., Tensor],
    scale: float,
    channels: int | None,
    conditions: list[str],
    doubled: dict[str, Any],
    x: Tensor,
    t: Tensor,
) -> Tensor:
    drop = torch.arange(2 * len(x), device=x.device) >= len(x)
    output = model(torch.cat([x, x]), torch.cat([t, t]), drop=dict.fromkeys(conditions, drop), **doubled)
    conditional, unconditional = output.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
