"""What is random in the loss of a sample: drawn from the seed and the sample's position in the endless stream alone.

So neither the number of processes or of a batch's parts changes it, nor that training was interrupted before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DROPPABLE = ("class_labels", "vector", "context", "concat")


class Draws(NamedTuple):
    """Timesteps (B,), noise (B, ...), and numbers in [0, 1) (B, 1 + conditions) that decide what is dropped."""

    t: Tensor
    noise: Tensor
    chances: Tensor


def draw(seed: int, first: int, x0: Tensor, num_train_timesteps: int) -> Draws:
    """Draws for a batch whose samples have the positions from `first` on; noise on the device of `x0` (B, ...)."""
    generator, noise = torch.Generator(x0.device), torch.empty_like(x0)
    t, chances = [], []
    for i in range(len(x0)):
        random = np.random.default_rng([seed, first + i, 1])
        t.append(int(random.integers(num_train_timesteps)))
        chances.append(random.random(1 + len(DROPPABLE)))
        noise[i].normal_(generator=generator.manual_seed(int(random.integers(2**63))))
    return Draws(torch.tensor(t, device=x0.device), noise, torch.tensor(np.array(chances), device=x0.device))


def dropped(names: Sequence[str], chances: Tensor, share: float) -> dict[str, Tensor]:
    """The samples (B,) that lose each of the conditions `names` in this step.

    A share loses all (Ho and Salimans 2022). Where there are several, each is lost alone as well, as often (Brooks et
    al. 2023), so that samples can be guided by any of them, or go without.
    """
    lost = chances < share
    if len(names) == 1:
        return {names[0]: lost[:, 0]}
    return {name: lost[:, 0] | lost[:, 1 + DROPPABLE.index(name)] for name in names}


def seed_layers(seed: int, first: int) -> None:
    """Seed what the network's layers draw themselves (dropout's masks) for the batch that begins at this position."""
    torch.manual_seed(int(np.random.SeedSequence([seed, first, 2]).generate_state(1, np.uint64)[0]))
