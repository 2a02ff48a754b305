"""Looking at a sampling while it runs: a strip, a GIF, and a picture that is there from the first steps on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unet_denoiser.utils.images import make_grid, save_gif, save_image

SHOWN, ROWS, COLUMNS, FRAMES = 16, 4, 10, 64  # images of a GIF; rows and moments of a strip; most moments kept


class TrajectoryRecorder:
    """Keeps moments of the first images' way from noise to data; an `on_step` for `sample` and its like.

    Memory does not grow with steps or samples: 64 moments of 16 images at most, and when there are more, every other
    one goes.

    Args:
        decode: makes pictures (B, C, H, W) in `data_range` of samples; for latents, their autoencoder.
        data_range: (low, high) of the pictures.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor] = lambda x: x, data_range: tuple[float, float] | None = None
    ) -> None:
        self.decode, self.data_range = decode, data_range
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.latest: tuple[Tensor, Tensor] | None = None
        self._every, self._count = 1, 0

    def __call__(self, step: Any) -> None:
        if step.rows.start:  # not among the first
            return
        self.latest = (step.x[:SHOWN].float().cpu(), step.x0[:SHOWN].float().cpu())
        if self._count % self._every == 0:
            if len(self.kept) == FRAMES:
                self.kept, self._every = self.kept[::2], 2 * self._every
            self.kept.append(self.latest)
        self._count += 1

    @property
    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """(x_t, predicted x0) of the moments kept and of the last one."""
        return self.kept if self.latest is None or self.latest is self.kept[-1] else [*self.kept, self.latest]

    def save_strip(self, path: str | Path) -> Path:
        """Up to ten moments from left to right; of each of the first four images x_t above the x0 predicted in it."""
        moments = self.moments
        chosen = torch.linspace(0, len(moments) - 1, min(COLUMNS, len(moments))).round().int().tolist()
        shown = torch.stack([torch.stack(moments[i])[:, :ROWS] for i in chosen])  # (moment, x_t or x0, sample, ...)
        rows = shown.permute(2, 1, 0, *range(3, shown.ndim)).flatten(0, 2)
        return save_image(make_grid(self.decode(rows), len(chosen), self.data_range), path)

    def save_gif(self, path: str | Path) -> Path:
        """The x0 predicted in each moment, 16 images at most."""
        return save_gif([make_grid(self.decode(x0), None, self.data_range) for _, x0 in self.moments], path)


class LivePreview:
    """Shows all samples every few steps: finished ones, those under way as predicted now, others grey; an `on_step`.

    Args:
        count: number of samples in all.
        every: steps between two pictures.
        save: called with all samples (count, C, *spatial).
    """

    def __init__(self, count: int, every: int, save: Callable[[Tensor], object]) -> None:
        self.count, self.every, self.save = count, every, save
        self.samples: Tensor | None = None
        self._steps = 0

    def __call__(self, step: Any) -> None:
        if self.samples is None:
            self.samples = torch.zeros(self.count, *step.x0.shape[1:])
        self.samples[step.rows] = step.x0.float().cpu()
        self._steps += 1
        if self._steps % self.every == 0:
            self.save(self.samples)
