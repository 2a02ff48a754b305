"""The randomness of the training loss, drawn from the seed and each sample's position in the training stream.

So it does not depend on the number of processes or of micro-batches, nor on interruptions.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from unet_denoiser.diffusion.loss import draw_noise

DROPPABLE = ("class_labels", "vector", "context", "concat")


class LossDraws(NamedTuple):
    """The random draws for the loss of a batch.

    t: (B,) timesteps. noise: (B, C, *spatial). chances: (B, 1 + conditions) in [0, 1), which decide on condition
    dropout. self_condition: (B,) bool, the samples that see an estimate of x0 (with self-conditioning). guidance: (B,)
    in [0, 1), the place of each guidance scale in its range (in distillation).
    """

    t: Tensor
    noise: Tensor
    chances: Tensor
    self_condition: Tensor
    guidance: Tensor

    def rows(self, rows: slice) -> Self:
        """Return the draws of some samples of the batch."""
        return type(self)(*(values[rows] for values in self))


def draw_for_loss(seed: int, first: int, x0: Tensor, num_train_timesteps: int, noise_offset: float = 0.0) -> LossDraws:
    """Draw for a batch x0 (B, C, *spatial), on its device; its samples have the positions `first`, `first` + 1, ..."""
    generator, noise = torch.Generator(x0.device), torch.empty_like(x0)
    t, chances, self_condition, guidance = [], [], [], []
    for i in range(len(x0)):
        random = np.random.default_rng([seed, first + i, 1])
        t.append(int(random.integers(num_train_timesteps)))
        chances.append(random.random(1 + len(DROPPABLE)))
        noise[i : i + 1] = draw_noise(x0[i : i + 1], noise_offset, generator.manual_seed(int(random.integers(2**63))))
        self_condition.append(random.random() < 0.5)
        guidance.append(np.float32(random.random()))
    draws = (t, chances, self_condition, guidance)
    numbers = [torch.tensor(np.array(values), device=x0.device) for values in draws]
    return LossDraws(numbers[0], noise, *numbers[1:])


def condition_dropout(names: Sequence[str], chances: Tensor, p: float) -> dict[str, Tensor]:
    """Return, for each of the conditions `names`, a mask (B,) of the samples that lose it in this step.

    Drop all conditions of a fraction `p` of the samples (classifier-free guidance, Ho and Salimans 2022). With several
    conditions, also drop each one alone with probability `p` (Brooks et al. 2023), so that each can be guided
    separately.
    """
    dropped = chances < p
    if len(names) == 1:
        return {names[0]: dropped[:, 0]}
    return {name: dropped[:, 0] | dropped[:, 1 + DROPPABLE.index(name)] for name in names}


def seed_dropout(seed: int, first: int) -> None:
    """Seed the dropout masks of the network's layers for the micro-batch that begins at position `first`."""
    torch.manual_seed(int(np.random.SeedSequence([seed, first, 2]).generate_state(1, np.uint64)[0]))
