"""Guidance: what a network's outputs with and without its conditions are combined to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.inputs import CONDITIONS
from unet_denoiser.recipe_sampling import SamplingConfig


class Guidance:
    """A function (x_t, t) -> output that bends the network's prediction towards its conditions.

    output = unconditional + guidance_scale * (conditional - unconditional) (Ho and Salimans 2022, equation 6, with
    guidance_scale = 1 + w). At 1 it is the network itself, called once; at 0 the unconditional network, called once;
    otherwise both halves run as one batch.

    Args:
        network: called as network(x, t, **conditions), with the conditions that are to count dropped by its `drop`
            argument. The tensors of all of a generation's calls are the same objects.
        config: `guidance_scale`.
        conditions: each (B, ...); None for those that are absent. `concat` counts as one; others than those of
            `CONDITIONS` (`context_mask`) go along with them.
        guided: the conditions that the unconditional half goes without; it keeps the others (default: all).
        channels: how many of the output's first channels are guided, where the others are no prediction (a learned
            variance); those are the conditional network's. All by default.

    Raises:
        ValueError: a scale other than 1 without any condition, or a name in `guided` that was not given.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        config: SamplingConfig | None = None,
        conditions: Mapping[str, Tensor | None] | None = None,
        *,
        guided: Sequence[str] | None = None,
        channels: int | None = None,
    ) -> None:
        self.network, self.channels = network, channels
        self.scale = scale = 1.0 if config is None else config.guidance_scale
        given = {name: value for name, value in (conditions or {}).items() if value is not None}
        self.inputs: dict[str, Any] = given
        names = [name for name in (*CONDITIONS, "concat") if name in given]
        if unknown := [name for name in guided or () if name not in names]:
            raise ValueError(f"guided={unknown[0]!r} is not one of the conditions given: {', '.join(names) or 'none'}")
        names = names if guided is None else list(guided)
        if scale == 1:
            return
        if not names:
            raise ValueError(f"guidance_scale={scale} needs a condition ({', '.join(CONDITIONS)}); without one give 1")
        dropped = torch.ones(len(given[names[0]]), dtype=torch.bool, device=given[names[0]].device)
        if scale == 0:
            self.inputs = given | {"drop": dict.fromkeys(names, dropped)}
            return
        doubled = {name: torch.cat([value, value]) for name, value in given.items()}
        self.inputs = doubled | {"drop": dict.fromkeys(names, torch.cat([~dropped, dropped]))}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided output; x (B, ...) what the network sees of the samples, t (B,)."""
        if self.scale in (0, 1):
            return self.network(x, t, **self.inputs)
        output = self.network(torch.cat([x, x]), torch.cat([t, t]), **self.inputs)
        conditional, unconditional = output.chunk(2)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
