"""Losses per noise level against a plain loop; weightings against the formulas of their papers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion, TrainingConfig, training_losses
from unet_denoiser.diffusion.loss import Losses
from unet_denoiser.diffusion.loss_weighting import LossWeighting, loss_weights
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.training.tracking import LossPerNoiseLevel


def test_losses_are_per_sample_with_their_timesteps():
    process, x0, t = Diffusion(prediction_type="epsilon"), torch.rand(6, 1, 4, 4), torch.tensor([0, 3, 500, 999, 3, 7])
    losses = training_losses(process, lambda x, t: torch.zeros_like(x), x0, t=t, noise=torch.full_like(x0, 2.0))
    assert_close(losses.error, torch.full((6,), 4.0))
    assert losses.t is t
    assert_close(losses.loss, losses.error)  # without a weighting


@pytest.mark.parametrize(("timesteps", "levels"), [(1000, 8), (10, 3), (4, 8)])
def test_mean_per_noise_level(timesteps, levels):
    collected, values = LossPerNoiseLevel(timesteps, levels), [[] for _ in range(levels)]
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


def test_loss_per_noise_level_resets_and_resumes():
    batch = Losses(torch.zeros(3), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 9]))
    first = LossPerNoiseLevel(10, 2)
    first.add(batch)
    second = LossPerNoiseLevel(10, 2)
    second.load_state_dict(first.state_dict())
    first.add(batch)
    assert second.means() == [1.5, 4.0]
    first.reset()
    assert first.means() == [None, None]
    assert second.means() == [1.5, 4.0]


# ---- weightings ------------------------------------------------------------------------------------------------------

SNR = torch.tensor([1e4, 40.0, 5.0, 1.0, 0.25, 1e-4])


def compute_weights(prediction, weighting, snr=SNR, **gammas):
    return loss_weights(PREDICTIONS[prediction], snr, TrainingConfig(loss_weighting=weighting, **gammas))


@pytest.mark.parametrize(
    ("weighting", "prediction", "expected"),
    [
        ("constant", "epsilon", lambda s: torch.ones_like(s)),
        ("constant", "sample", lambda s: torch.ones_like(s)),
        ("min_snr", "epsilon", lambda s: torch.minimum(s, torch.tensor(5.0)) / s),  # Hang et al. 2023, section 3.4
        ("min_snr", "v_prediction", lambda s: torch.minimum(s, torch.tensor(5.0)) / (s + 1)),
        ("min_snr", "sample", lambda s: torch.minimum(s, torch.tensor(5.0))),
        ("p2", "epsilon", lambda s: 1 / (1 + s)),  # Choi et al. 2022, equation 8
        ("p2", "v_prediction", lambda s: s / (1 + s) ** 2),
        ("truncated_snr", "sample", lambda s: torch.maximum(s, torch.tensor(1.0))),  # Salimans and Ho 2022, section 4
        ("truncated_snr", "v_prediction", lambda s: torch.maximum(s, torch.tensor(1.0)) / (s + 1)),
    ],
)
def test_weights_equal_the_papers(weighting, prediction, expected):
    assert_close(compute_weights(prediction, weighting), expected(SNR))


def test_gamma_options():
    assert_close(compute_weights("sample", "min_snr", min_snr_gamma=2.0), SNR.clamp(max=2.0))
    assert_close(compute_weights("epsilon", "p2", p2_gamma=0.5), (1 + SNR) ** -0.5)
    assert_close(compute_weights("epsilon", "p2", p2_gamma=0.0), torch.ones(6))


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "truncated_snr"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_weighting_is_the_same_for_every_prediction_type(weighting, schedule):
    """Three networks that stand for the same x0 are pulled towards the true one alike, at every noise level."""
    config, t = TrainingConfig(loss_weighting=weighting), torch.tensor([0, 20, 300, 600, 900])
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.rand(5, 2, 3, 3, generator=g), torch.randn(5, 2, 3, 3, generator=g)
    gradients = {}
    for prediction in ("epsilon", "v_prediction", "sample"):
        if (prediction, weighting) == ("epsilon", "truncated_snr"):
            continue
        process = Diffusion(beta_schedule=schedule, prediction_type=prediction)
        alpha, sigma = process.alpha_sigma(t, x0)
        own = (x0 + 0.1 * torch.randn(x0.shape, generator=g.manual_seed(1))).requires_grad_()

        def model(xt, t, own=own, alpha=alpha, sigma=sigma, prediction=prediction):
            epsilon = (xt - alpha * own) / sigma
            return {"epsilon": epsilon, "sample": own, "v_prediction": alpha * epsilon - sigma * own}[prediction]

        weighting_ = LossWeighting(process.prediction, process.snr, config)
        training_losses(process, model, x0, t=t, noise=noise, weighting=weighting_).loss.mean().backward()
        gradients[prediction] = own.grad
    first, *others = gradients.values()
    assert first.abs().flatten(1).amax(1).min() > 0
    for other in others:
        assert_close(other, first, rtol=5e-3, atol=0)


def test_refuses_an_unbounded_weight():
    with pytest.raises(ValueError, match=r"'truncated_snr' with prediction_type='epsilon'.*use 'v_prediction'"):
        compute_weights("epsilon", "truncated_snr")


def test_learned_uncertainty_fits_the_loss_of_every_noise_level():
    """For errors of known mean, u becomes its logarithm, and all levels then count the same."""
    process = Diffusion(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    weighting = LossWeighting(process.prediction, process.snr, TrainingConfig(loss_weighting="learned"))
    t_all = torch.arange(1000)
    expected = 0.02 + 0.5 * (t_all / 1000) ** 2
    assert_close(weighting(expected, t_all), expected)  # nothing is known at the start
    for _ in range(600):
        t = torch.randint(1000, (128,))
        weighting(expected[t] * torch.rand(128) * 2, t).mean().backward()
        weighting.step()
        weighting.zero_grad()
    ratio = weighting.uncertainty(t_all).exp() / expected
    assert ratio.log().abs().mean() < 0.1
    error = expected.clone().requires_grad_()
    weighting(error, t_all).sum().backward()
    assert_close(error.grad * expected, 1 / ratio)


def test_learned_uncertainty_resumes_and_averages_over_processes():
    def make():
        return LossWeighting(PREDICTIONS["epsilon"], Diffusion().snr, TrainingConfig(loss_weighting="learned"))

    def learn(weighting, size, mean=lambda gradient: gradient):
        t = torch.tensor([10, 500])
        weighting(torch.full((2,), size), t).mean().backward()
        weighting.step(mean)
        weighting.zero_grad()
        return weighting.uncertainty.weight.detach().clone()

    first, second = make(), make()
    learn(first, 0.1)
    assert set(second.tensors()) == set(first.tensors())  # whether it has learned or not
    second.load(deepcopy(first.tensors()))
    assert torch.equal(learn(second, 0.5), learn(first, 0.5))
    seen = []
    learn(make(), 0.2, mean=lambda gradient: seen.append(gradient.clone()) or gradient)
    assert_close(seen[0], 0.8 * first.uncertainty.features[torch.tensor([10, 500])].mean(0))
    still = learn(make(), 0.2, mean=torch.zeros_like)
    assert not still.any()
    assert LossWeighting(PREDICTIONS["epsilon"], Diffusion().snr, TrainingConfig()).tensors() == {}
