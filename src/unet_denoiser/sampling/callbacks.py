"""`on_step` callbacks of `sample`: a trajectory as a strip or GIF, and a live preview."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unet_denoiser.sampling.loop import Step
from unet_denoiser.utils.images import make_grid, save_gif, save_image

MAX_IMAGES, MAX_FRAMES = 16, 64  # kept of a trajectory
STRIP_IMAGES, STRIP_FRAMES = 4, 10


class TrajectoryRecorder:
    """Records the way of the first batch from noise to data; an `on_step` callback for `sample`.

    It keeps at most 64 frames of 16 images, and drops every other frame when there are more.

    Args:
        decode: turns samples into images (B, C, H, W) in `data_range`; for latents, their autoencoder's decode.
        data_range: (low, high) of the images.
    """

    def __init__(
        self, decode: Callable[[Tensor], Tensor] = lambda x: x, data_range: tuple[float, float] | None = None
    ) -> None:
        self.decode, self.data_range = decode, data_range
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.latest: tuple[Tensor, Tensor] | None = None
        self._every, self._count = 1, 0

    def __call__(self, step: Step) -> None:
        if step.indices.start:  # not in the first batch
            return
        self.latest = (step.x[:MAX_IMAGES].float().cpu(), step.x0[:MAX_IMAGES].float().cpu())
        if self._count % self._every == 0:
            if len(self.kept) == MAX_FRAMES:
                self.kept, self._every = self.kept[::2], 2 * self._every
            self.kept.append(self.latest)
        self._count += 1

    @property
    def frames(self) -> list[tuple[Tensor, Tensor]]:
        """(x_t, predicted x0) of the steps kept and of the last step."""
        return self.kept if self.latest is None or self.latest is self.kept[-1] else [*self.kept, self.latest]

    def save_strip(self, path: str | Path) -> Path:
        """Save up to ten frames from left to right: of each of the first four images, x_t above its predicted x0."""
        frames = self.frames
        indices = torch.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().int().tolist()
        # (frame, x_t or x0, image, C, H, W)
        strip = torch.stack([torch.stack(frames[i])[:, :STRIP_IMAGES] for i in indices])
        tiles = strip.permute(2, 1, 0, *range(3, strip.ndim)).flatten(0, 2)
        return save_image(make_grid(self.decode(tiles), len(indices), self.data_range), path)

    def save_gif(self, path: str | Path) -> Path:
        """Save the predicted x0 of each frame, at most 16 images."""
        return save_gif([make_grid(self.decode(x0), None, self.data_range) for _, x0 in self.frames], path)


class LivePreview:
    """Shows all samples every few steps, unfinished ones as predicted so far and others grey; an `on_step` callback.

    Args:
        count: number of samples in all.
        every: steps from one preview to the next.
        save: called with all samples (count, C, *spatial).
    """

    def __init__(self, count: int, every: int, save: Callable[[Tensor], object]) -> None:
        self.count, self.every, self.save = count, every, save
        self.samples: Tensor | None = None
        self._steps = 0

    def __call__(self, step: Step) -> None:
        if self.samples is None:
            self.samples = torch.zeros(self.count, *step.x0.shape[1:])
        self.samples[step.indices] = step.x0.float().cpu()
        self._steps += 1
        if self._steps % self.every == 0:
            self.save(self.samples)
