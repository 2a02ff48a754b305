"""schedule.json against the process: every level's factors give the same x0, input and x_t."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unet_denoiser import Diffusion
from unet_denoiser.export.schedule import describe_schedule

PROCESSES = {
    "epsilon": Diffusion(),
    "v, zero SNR": Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "x0": Diffusion(prediction_type="sample", beta_schedule="linear"),
    "flow": Diffusion(path="flow"),
    "edm": Diffusion(path="edm"),
}


@pytest.mark.parametrize("name", PROCESSES)
@settings(max_examples=25, deadline=None)
@given(k=st.integers(0, 998), seed=st.integers(0, 99))
def test_its_factors_are_those_of_the_process(name, k, seed):
    process, g = PROCESSES[name], torch.Generator().manual_seed(seed)
    levels = {key: column[k] for key, column in describe_schedule(process, [k])["levels"].items()}
    assert levels["alpha"] ** 2 + levels["sigma"] ** 2 == pytest.approx(1)
    assert levels["time"] == pytest.approx(process.times[k].item())
    x, output = torch.randn(2, 1, 1, 4, generator=g), torch.randn(2, 1, 1, 4, generator=g)
    alpha, sigma = process.alpha_sigma(torch.tensor([k]), x)
    seen = process.network_input(x, alpha, sigma)
    np.testing.assert_allclose(levels["c_in"] * x, seen, rtol=1e-4, atol=1e-5)
    x0 = process.predict_x0(output, x, alpha, sigma, clip=False)
    scale = abs(levels["c_skip"]) + abs(levels["c_out"])
    np.testing.assert_allclose(levels["c_skip"] * x + levels["c_out"] * output, x0, rtol=1e-3, atol=1e-4 * scale)


def test_it_holds_plain_numbers():
    found = describe_schedule(Diffusion(path="edm"), np.array([999, 10]))
    assert found["steps"] == [999, 10]
    assert found["data_range"] == [-1, 1]
    assert describe_schedule(Diffusion(), [0], clip_sample=False)["data_range"] is None
    assert all(isinstance(value, float) for column in found["levels"].values() for value in column)
