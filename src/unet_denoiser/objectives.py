"""What a batch's loss consists of: one value per sample, and its mean per noise level."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Losses(NamedTuple):
    """A batch's losses, one value per sample, (B,) each in float32.

    Args:
        loss: what is minimised.
        error: the mean squared error of what the network predicts, without any weight; this is what tells how well
            it does at a noise level, whatever the weights and whatever else is minimised.
        t: the timesteps, integers.
    """

    loss: Tensor
    error: Tensor
    t: Tensor


class LossPerLevel:
    """Collects the unweighted error over training steps, separately for equal ranges of the timestep.

    `totals` is (2, num_levels): summed errors and how many samples they are of. Across processes, sum it
    (`accelerator.reduce(levels.totals)`) before `means`. It has `state_dict` and `load_state_dict`, so that a log goes
    on exactly after a checkpoint.

    Args:
        num_train_timesteps: T; level i of n holds the timesteps from i T / n on.
        num_levels: how many ranges, the least noisy first.
    """

    def __init__(self, num_train_timesteps: int, num_levels: int = 8) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.totals = torch.zeros(2, num_levels)

    def add(self, losses: Losses) -> None:
        """Take in one batch; nothing waits for the device."""
        level = losses.t.long() * self.totals.shape[1] // self.num_train_timesteps
        error = losses.error.detach().float()
        self.totals = self.totals.to(error.device)
        self.totals.index_add_(1, level, torch.stack([error, torch.ones_like(error)]))

    def means(self, totals: Tensor | None = None) -> list[float | None]:
        """The mean error of each level since the last `reset`, None for one that no sample fell into."""
        sums, counts = (self.totals if totals is None else totals).tolist()
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]

    def reset(self) -> None:
        """Start anew."""
        self.totals = torch.zeros_like(self.totals)

    def state_dict(self) -> dict[str, Any]:
        """What has been collected since the last `reset`."""
        return {"totals": self.totals.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.totals = state["totals"].clone()
