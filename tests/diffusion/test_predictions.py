"""The table of prediction types against finite differences of its own definitions."""

import pytest
import torch
from torch.testing import assert_close

from unet_denoiser.diffusion.predictions import PREDICTIONS

ALPHA = torch.tensor(0.8, dtype=torch.float64)
SIGMA = (1 - ALPHA**2).sqrt()


@pytest.mark.parametrize("name", PREDICTIONS)
def test_functions_of_a_prediction_type_agree(name):
    prediction = PREDICTIONS[name]
    x0, eps = torch.randn(2, 5, dtype=torch.float64)
    xt = ALPHA * x0 + SIGMA * eps
    output = prediction.target(x0, eps, ALPHA, SIGMA)
    assert_close(prediction.x0(output, xt, ALPHA, SIGMA), x0)

    changed = output + 0.1  # at one x_t
    error = (prediction.x0(changed, xt, ALPHA, SIGMA) - x0).square()
    snr = (ALPHA / SIGMA) ** 2
    assert_close(torch.full_like(error, 0.01), prediction.error_scale(snr) * error)

    # the score is -eps / sigma, and eps follows from x0 at one x_t
    score_change = -((xt - ALPHA * prediction.x0(changed, xt, ALPHA, SIGMA)) / SIGMA - eps) / SIGMA
    assert_close(torch.full_like(score_change, 0.1), prediction.score_scale(ALPHA, SIGMA) * score_change)
