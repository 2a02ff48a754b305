"""The training loss: squared error, self-conditioning, offset noise, and finite values for every combination."""

import math
from itertools import product
from typing import get_args

import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion, TrainingConfig, denoise, training_losses
from unet_denoiser.config.base import BetaSchedule, LossWeightingName, VarianceType
from unet_denoiser.diffusion.loss import draw_noise
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.diffusion.predictions import PREDICTIONS
from unet_denoiser.sampling.samplers import SAMPLERS


def test_loss_is_the_mean_squared_error_per_sample():
    process = Diffusion(prediction_type="epsilon")
    x0, noise, t = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 400, 999])
    given = {}

    def model(x, t, **inputs):
        given.update(inputs, x=x, t=t)
        return torch.full_like(x, 0.25)

    losses = training_losses(process, model, x0, t=t, noise=noise, class_labels=t)
    assert_close(losses.loss, ((noise - 0.25) ** 2).mean((1, 2, 3)))
    assert_close(given["x"], process.add_noise(x0, noise, t))
    assert given["class_labels"] is t


def test_loss_draws_all_timesteps_and_standard_noise():
    process = Diffusion(prediction_type="sample")
    seen = []
    training_losses(process, lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(20_000, 1))
    assert (seen[0].min(), seen[0].max()) == (0, 999)
    assert seen[0].float().mean().item() == pytest.approx(499.5, abs=8)
    process = Diffusion(prediction_type="epsilon")
    losses = training_losses(process, lambda x, t: torch.zeros_like(x), torch.zeros(2000, 16))
    assert losses.loss.mean().item() == pytest.approx(1.0, abs=0.03)  # the variance of the noise


class Linear(torch.nn.Module):
    """A network with one parameter and the channels that a process needs."""

    def __init__(self, process, data_channels):
        super().__init__()
        self.out_channels = process.channels(data_channels)["out_channels"]
        self.gain = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return self.gain * x.mean(1, keepdim=True).expand(-1, self.out_channels, *x.shape[2:])


@pytest.mark.parametrize("schedule", get_args(BetaSchedule))
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_combination_of_options_is_finite_or_refused(schedule, prediction, zero_snr):
    """Losses and gradients at the first, a middle and the last timestep, and a few steps of every sampler.

    For every variance, with and without self-conditioning, under every weighting.
    """
    options = {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    if zero_snr and prediction == "epsilon":
        with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*use 'v_prediction'"):
            Diffusion(**options)
        return
    for variance, self_conditioning in product(get_args(VarianceType), (False, True)):
        process = Diffusion(**options, variance_type=variance, self_conditioning=self_conditioning)
        assert (process.alphas[-1] == 0) == zero_snr
        network = Linear(process, 2)
        for name in get_args(LossWeightingName):
            config = TrainingConfig(loss_weighting=name)
            if (name, prediction) == ("truncated_snr", "epsilon"):
                with pytest.raises(ValueError, match=r"loss_weighting='truncated_snr' with prediction_type='epsilon'"):
                    LossWeighting(process.prediction, process.snr, config)
                continue
            weighting = LossWeighting(process.prediction, process.snr, config)
            t, x0 = torch.tensor([0, 1, 500, 998, 999]), torch.rand(5, 2, 3, 3)
            losses = training_losses(process, network, x0, t=t, noise=draw_noise(x0, 0.1), weighting=weighting)
            network.gain.grad = None
            losses.loss.mean().backward()
            weighting.step()
            assert losses.loss.isfinite().all()
            assert losses.error.isfinite().all()
            assert network.gain.grad.isfinite()
            assert network.gain.grad.abs() > 0
        for sampler, kind in SAMPLERS.items():
            if not (zero_snr and kind.needs_finite_start):
                *_, last = denoise(network, process, torch.randn(2, 2, 3, 3), sampler=sampler, num_inference_steps=3)
                assert last.x.isfinite().all()
                assert last.x.abs().max() <= 1.001  # the range of the data


@pytest.mark.parametrize(
    "options", [{"path": "flow", "shift": 3.0}, {"path": "edm"}, {"path": "edm", "prediction_type": "sample"}]
)
def test_every_combination_of_options_is_finite_for_each_path(options):
    """As above, with the weightings, variances and samplers that the other paths have too."""
    for variance, self_conditioning in product(get_args(VarianceType), (False, True)):
        process = Diffusion(**options, variance_type=variance, self_conditioning=self_conditioning)
        network = Linear(process, 2)
        for name in get_args(LossWeightingName):
            weighting = LossWeighting(process.prediction, process.snr, TrainingConfig(loss_weighting=name))
            t, x0 = torch.tensor([0, 1, 500, 998, 999]), torch.rand(5, 2, 3, 3)
            losses = training_losses(process, network, x0, t=t, noise=draw_noise(x0, 0.1), weighting=weighting)
            network.gain.grad = None
            losses.loss.mean().backward()
            assert losses.loss.isfinite().all()
            assert network.gain.grad.isfinite()
            assert network.gain.grad.abs() > 0
        for sampler in SAMPLERS:
            *_, last = denoise(network, process, torch.randn(2, 2, 3, 3), sampler=sampler, num_inference_steps=3)
            assert last.x.isfinite().all()
            assert last.x.abs().max() <= 1.001


def test_offset_noise_is_shared_by_the_pixels_of_a_channel():
    x0 = torch.zeros(500, 2, 16, 16)
    noise = draw_noise(x0, 0.5, torch.Generator().manual_seed(0))
    means = noise.mean((2, 3))
    assert means.std().item() == pytest.approx(math.sqrt(0.25 + 1 / 256), rel=0.1)
    assert (noise - means[:, :, None, None]).std().item() == pytest.approx(1.0, rel=0.02)
    assert torch.corrcoef(means.T)[0, 1].abs() < 0.2  # each channel has a draw of its own
    assert torch.equal(noise, draw_noise(x0, 0.5, torch.Generator().manual_seed(0)))
    assert draw_noise(x0).mean((2, 3)).std().item() == pytest.approx(1 / 16, rel=0.1)


def test_self_conditioned_samples_see_a_first_estimate():
    """The clipped x0 of a pass without an estimate and without gradients, with the same conditions; zeros otherwise."""
    process, calls = Diffusion(self_conditioning=True, prediction_type="v_prediction"), []
    gain = torch.tensor(0.5, requires_grad=True)

    def model(x, t, labels, drop):
        calls.append({"x": x, "t": t, "labels": labels, "drop": drop["labels"], "grad": torch.is_grad_enabled()})
        return gain * x[:, :1]

    x0, noise, t = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.arange(4) * 200
    labels, seeing = torch.arange(4), torch.tensor([True, False, False, True])
    options = {"t": t, "noise": noise, "labels": labels, "drop": {"labels": labels > 1, "none": None}}
    losses = training_losses(process, model, x0, self_condition=seeing, **options)
    first, second = calls
    xt = process.add_noise(x0, noise, t)
    assert first["labels"].tolist() == [0, 3]
    assert (first["grad"], second["grad"]) == (False, True)
    assert torch.equal(first["t"], t[[0, 3]])
    assert first["drop"].tolist() == [False, True]
    assert_close(first["x"], torch.cat([xt, torch.zeros_like(xt)], dim=1)[[0, 3]])
    estimate = process.predict_x0(0.5 * xt, xt, *process.alpha_sigma(t, xt)).detach()
    estimate[1:3] = 0
    assert_close(second["x"], torch.cat([xt, estimate], dim=1))
    losses.loss.mean().backward()
    with torch.no_grad():
        direct = 2 * ((gain * xt - process.target(x0, noise, t)) * xt).mean()
    assert_close(gain.grad, direct)  # no gradient came through the estimate


def test_half_of_the_samples_see_an_estimate_and_the_network_always_runs_twice():
    process, seen = Diffusion(self_conditioning=True), []

    def model(x, t):
        seen.append(x[:, 1:].flatten(1).any(1))
        return x[:, :1]

    for _ in range(100):
        training_losses(process, model, torch.rand(2, 1, 2, 2))
    assert len(seen) == 200
    assert not torch.cat(seen[::2]).any()
    assert torch.cat(seen[1::2]).float().mean().item() == pytest.approx(0.5, abs=0.15)


def test_refuses_a_network_with_other_output_channels():
    with pytest.raises(ValueError, match="output has 2 channels; variance_type='fixed_small' needs 1"):
        training_losses(Diffusion(), lambda x, t: x.repeat(1, 2, 1, 1), torch.zeros(2, 1, 4, 4))
