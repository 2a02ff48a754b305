"""Sinusoids and time MLP against diffusers, closed forms and the specification."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch.testing import assert_close

from support import specification
from support.networks import randomise
from unet_denoiser import SinusoidalPosEmb
from unet_denoiser.models.layers.embeddings import TimeMLP

TIMES = torch.tensor([0.0, 1.0, 0.37, 20.5, 999.0, 1000.0])


@pytest.mark.parametrize("dim", [4, 5, 32, 33, 320])
@pytest.mark.parametrize(("frequencies", "shift"), [("endpoint", 1), ("half", 0)])
def test_sinusoids_equal_diffusers(dim, frequencies, shift):
    expected = get_timestep_embedding(TIMES, dim, downscale_freq_shift=shift)
    assert_close(SinusoidalPosEmb(dim, frequencies)(TIMES), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("frequencies", ["endpoint", "half"])
def test_sinusoids_of_two_and_three_channels_have_frequency_one(frequencies):
    expected = torch.stack([TIMES.sin(), TIMES.cos()], dim=1)
    assert_close(SinusoidalPosEmb(2, frequencies)(TIMES), expected)
    assert_close(SinusoidalPosEmb(3, frequencies)(TIMES), F.pad(expected, (0, 1)))


def test_sinusoids_equal_the_specification():
    assert_close(SinusoidalPosEmb(16)(TIMES), specification.SinusoidalPosEmb(16)(TIMES), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64])
def test_sinusoids_take_integers(dtype):
    assert_close(
        SinusoidalPosEmb(8)(torch.tensor([3, 999], dtype=dtype)), SinusoidalPosEmb(8)(torch.tensor([3.0, 999.0]))
    )


@pytest.mark.parametrize("dim", [1, 0])
def test_sinusoids_need_two_channels(dim):
    with pytest.raises(ValueError, match=f"dim={dim} .*at least 2"):
        SinusoidalPosEmb(dim)


def test_time_mlp():
    mlp = randomise(TimeMLP(16, "half"))
    hidden = F.silu(F.linear(SinusoidalPosEmb(16, "half")(TIMES), mlp[1].weight, mlp[1].bias))
    assert_close(mlp(TIMES), F.linear(hidden, mlp[3].weight, mlp[3].bias))
    assert mlp(TIMES).shape == (len(TIMES), 64)


def test_time_mlp_in_bfloat16_still_tells_neighbouring_timesteps_apart():
    mlp = randomise(TimeMLP(16)).bfloat16()
    out = mlp(torch.tensor([998, 999, 1000]))
    assert out.dtype == torch.bfloat16
    assert (out[0] - out[1]).abs().max() > 0.05
    assert (out[1] - out[2]).abs().max() > 0.05
