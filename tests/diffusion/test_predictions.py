"""The table of prediction types against finite differences of its own definitions, and against the papers' formulas."""

import pytest
import torch
from torch.testing import assert_close

from support.oracles import preconditioning
from unet_denoiser import Diffusion, Guidance, TrainingConfig, denoise, training_losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.diffusion.predictions import PREDICTIONS, Prediction, get_prediction

ALPHA = torch.tensor(0.8, dtype=torch.float64)
SIGMA = (1 - ALPHA**2).sqrt()


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_functions_of_a_prediction_type_agree(name, sigma_data):
    prediction = get_prediction(name, sigma_data)
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


@pytest.mark.parametrize(("path", "name"), [*(("vp", name) for name in PREDICTIONS), ("flow", "flow"), ("edm", "edm")])
def test_a_row_is_the_preconditioning_of_its_paper(path, name):
    """x0 = c_skip x_t + c_out F(c_in x_t, time), at all levels but the noisiest, where an alpha of 0 divides."""
    process = Diffusion(path=path, prediction_type=name)
    t = torch.arange(0, 998, 7)
    alpha, sigma = (table.double()[t, None] for table in (process.alphas, process.sigmas))
    c_in, c_skip, c_out = preconditioning(process, alpha, sigma)
    x0, eps = torch.randn(2, len(t), 3, dtype=torch.float64)
    xt, output = alpha * x0 + sigma * eps, torch.randn(len(t), 3, dtype=torch.float64)
    # float32 levels are of unit norm to some 1e-7 only
    assert_close(
        process.predict_x0(output, xt, alpha, sigma, clip=False), c_skip * xt + c_out * output, rtol=0, atol=1e-5
    )
    assert_close(process.network_input(xt, alpha, sigma), c_in * xt)
    snr = (alpha / sigma) ** 2
    assert_close(process.prediction.error_scale(snr), 1 / c_out**2, rtol=1e-5, atol=0)
    output = process.prediction.target(x0, eps, alpha, sigma)
    assert_close(process.predict_x0(output, xt, alpha, sigma, clip=False), x0, rtol=0, atol=1e-5)


def test_a_new_row_is_all_that_a_prediction_type_needs(monkeypatch):
    """A network for -sigma eps, the score times sigma^2: trained, weighted, guided and sampled as all others are."""
    row = Prediction(
        target=lambda x0, eps, alpha, sigma: -sigma * eps,
        x0=lambda output, xt, alpha, sigma: (xt + output) / alpha,
        error_scale=lambda snr: snr / (1 + snr),  # alpha^2
    )
    monkeypatch.setitem(PREDICTIONS, "score", row)
    process = Diffusion(prediction_type="score", clip_sample_range=None)
    assert Diffusion.from_dict(process.to_dict()).prediction_type == "score"
    data = 0.3 * torch.ones(4, 1, 2, 2)

    def network(seen, t):  # perfect, for data that are one image
        alpha, _ = process.alpha_sigma(t.long(), seen)
        return alpha * data[0] - seen

    weighting = LossWeighting(process.prediction, process.snr, TrainingConfig(loss_weighting="min_snr"))
    assert training_losses(process, network, data, weighting=weighting).loss.max() < 1e-10
    *_, step = denoise(
        Guidance(network, prediction_type="score"), process, torch.randn(4, 1, 2, 2), num_inference_steps=5
    )
    assert_close(step.x, data, rtol=0, atol=1e-4)
