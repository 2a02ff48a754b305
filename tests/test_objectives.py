"""Losses per noise level against a plain loop."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion
from unet_denoiser.objectives import Losses, LossPerLevel


def test_losses_are_per_sample_with_their_timesteps():
    process, x0, t = Diffusion(), torch.rand(6, 1, 4, 4), torch.tensor([0, 3, 500, 999, 3, 7])
    losses = process.losses(lambda x, t: torch.zeros_like(x), x0, t=t, noise=torch.full_like(x0, 2.0))
    assert_close(losses.error, torch.full((6,), 4.0))
    assert losses.t is t
    assert_close(process.loss(lambda x, t: torch.zeros_like(x), x0, t=t, noise=torch.full_like(x0, 2.0)), losses.loss)


@pytest.mark.parametrize(("timesteps", "levels"), [(1000, 8), (10, 3), (4, 8)])
def test_mean_per_level(timesteps, levels):
    collected, values = LossPerLevel(timesteps, levels), [[] for _ in range(levels)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        t, error = rng.integers(0, timesteps, 40), rng.random(40)
        collected.add(Losses(torch.zeros(40), torch.tensor(error).requires_grad_(), torch.tensor(t)))
        for i, e in zip(t, error, strict=True):
            values[int(i / timesteps * levels + 1e-9)].append(e)
    means = collected.means()
    assert [m is None for m in means] == [not v for v in values]
    assert [m for m in means if m is not None] == pytest.approx([np.mean(v) for v in values if v], rel=1e-5)
    assert not collected.totals.requires_grad
    assert collected.means(collected.totals * 2) == means  # two processes that saw the same


def test_levels_start_anew_and_go_on_from_a_state():
    batch = Losses(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 9]))
    first = LossPerLevel(10, 2)
    first.add(batch)
    second = LossPerLevel(10, 2)
    second.load_state_dict(first.state_dict())
    first.add(batch)
    assert second.means() == [1.5, 4.0]
    first.reset()
    assert first.means() == [None, None]
    assert second.means() == [1.5, 4.0]
