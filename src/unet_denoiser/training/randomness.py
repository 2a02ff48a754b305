"""What is random in the loss of a sample: drawn from the seed and the sample's position in the endless stream alone.

So neither the number of processes or of a batch's parts changes it, nor that training was interrupted before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.diffusion.loss import draw_noise

DROPPABLE = ("class_labels", "vector", "context", "concat")


class LossDraws(NamedTuple):
    """What the loss of a batch takes that is random.

    t: timesteps, (B,). noise: (B, ...). chances: in [0, 1), (B, 1 + conditions), they decide what is dropped.
    self_condition: (B,) bool, which samples see an estimate of x0, with self-conditioning.
    """

    t: Tensor
    noise: Tensor
    chances: Tensor
    self_condition: Tensor


def draw_for_loss(seed: int, first: int, x0: Tensor, num_train_timesteps: int, noise_offset: float = 0.0) -> LossDraws:
    """Draws for a batch whose samples have the positions from `first` on, on the device of `x0` (B, ...)."""
    generator, noise = torch.Generator(x0.device), torch.empty_like(x0)
    t, chances, self_condition = [], [], []
    for i in range(len(x0)):
        random = np.random.default_rng([seed, first + i, 1])
        t.append(int(random.integers(num_train_timesteps)))
        chances.append(random.random(1 + len(DROPPABLE)))
        noise[i : i + 1] = draw_noise(x0[i : i + 1], noise_offset, generator.manual_seed(int(random.integers(2**63))))
        self_condition.append(random.random() < 0.5)
    numbers = [torch.tensor(np.array(values), device=x0.device) for values in (t, chances, self_condition)]
    return LossDraws(numbers[0], noise, numbers[1], numbers[2])


def condition_dropout(names: Sequence[str], chances: Tensor, share: float) -> dict[str, Tensor]:
    """The samples (B,) that lose each of the conditions `names` in this step.

    A share loses all (Ho and Salimans 2022). Where there are several, each is lost alone as well, as often (Brooks et
    al. 2023), so that samples can be guided by any of them, or go without.
    """
    lost = chances < share
    if len(names) == 1:
        return {names[0]: lost[:, 0]}
    return {name: lost[:, 0] | lost[:, 1 + DROPPABLE.index(name)] for name in names}


def seed_dropout(seed: int, first: int) -> None:
    """Seed what the network's layers draw themselves (dropout's masks) for the batch that begins at this position."""
    torch.manual_seed(int(np.random.SeedSequence([seed, first, 2]).generate_state(1, np.uint64)[0]))
