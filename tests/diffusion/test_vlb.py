"""The variational bound against guided-diffusion's, and against torch's distributions."""

import math

import guided_diffusion.gaussian_diffusion as guided
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from unet_denoiser import Diffusion, training_losses
from unet_denoiser.diffusion.vlb import _negative_log_likelihood

T = 200
PEERS = {"epsilon": guided.ModelMeanType.EPSILON, "sample": guided.ModelMeanType.START_X}


def batch(seed=0):
    """Images that include the outermost values, noise, and the first, a middle and the last timestep, twice each."""
    g = torch.Generator().manual_seed(seed)
    x0 = (torch.randint(0, 256, (6, 2, 4, 4), generator=g) / 127.5 - 1).clamp(-1, 1)
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1.0, 1.0
    return x0, torch.randn(x0.shape, generator=g), torch.tensor([0, 0, 70, 70, T - 1, T - 1])


@pytest.mark.parametrize("prediction", PEERS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_hybrid_loss_equals_guided_diffusion(prediction, schedule, monkeypatch):
    monkeypatch.setattr("guided_diffusion.losses.approx_standard_normal_cdf", torch.special.ndtr)  # ours is exact
    process = Diffusion(
        num_train_timesteps=T, beta_schedule=schedule, prediction_type=prediction, variance_type="learned_range"
    )
    peer = guided.GaussianDiffusion(
        betas=process.scheduler.betas.numpy(),
        model_mean_type=PEERS[prediction],
        model_var_type=guided.ModelVarType.LEARNED_RANGE,
        loss_type=guided.LossType.RESCALED_MSE,
    )
    x0, noise, t = batch()
    prediction_error = 0.02 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    target = process.target(x0, noise, t) + prediction_error
    outputs = [torch.cat([target, 2 * torch.rand_like(x0) - 1], dim=1).requires_grad_()]
    outputs.append(outputs[0].detach().clone().requires_grad_())
    ours = training_losses(process, lambda xt, t: outputs[0], x0, t=t, noise=noise)
    theirs = peer.training_losses(lambda xt, t: outputs[1], x0, t, noise=noise)
    assert_close(ours.error, theirs["mse"])
    assert_close(ours.loss, theirs["loss"], rtol=2e-3, atol=1e-6)
    assert (ours.loss - ours.error).abs().min() > 0
    ours.loss.sum().backward()
    theirs["loss"].sum().backward()
    assert_close(outputs[0].grad, outputs[1].grad, rtol=5e-3, atol=1e-5 * outputs[1].grad.abs().max().item())


def test_terms_equal_torch_kl_divergence_and_log_prob():
    process = Diffusion(num_train_timesteps=T, variance_type="learned_range", clip_sample_range=None)
    x0, noise, t = batch()
    xt, bound = process.add_noise(x0, noise, t), process.bound
    predicted, variance = x0 + 0.1 * torch.randn_like(x0), 2 * torch.rand_like(x0) - 1
    terms = bound(x0, xt, t, predicted, variance, data_range=None) * math.log(2)
    for i in (0, 2, 4):
        of_x0, of_xt, low, high = bound._tables[[2, 3, 0, 1], t[i]]
        std = (0.5 * (low + (variance[i] + 1) / 2 * (high - low))).exp()
        own = Normal(of_x0 * predicted[i] + of_xt * xt[i], std)
        posterior = Normal(of_x0 * x0[i] + of_xt * xt[i], (0.5 * low).exp())
        expected = -own.log_prob(x0[i]) if t[i] == 0 else kl_divergence(posterior, own)
        assert_close(terms[i], expected.mean(), rtol=1e-4, atol=1e-6)


def test_probabilities_of_all_values_sum_to_one():
    """Those of the 256 steps of any data range, whose outermost steps reach to infinity."""
    for r in (1.0, 0.5):
        values = torch.linspace(-r, r, 256)
        nll = _negative_log_likelihood(values, torch.full((256,), 0.9 * r), torch.full((256,), -1.0), (-r, r))
        assert (-nll).exp().sum().item() == pytest.approx(1.0, abs=1e-4)


def test_bound_is_zero_for_the_true_posterior():
    process = Diffusion(num_train_timesteps=T, variance_type="learned_range")
    x0, noise, t = batch()
    xt = process.add_noise(x0, noise, t)
    terms = process.bound(x0, xt, t, x0, -torch.ones_like(x0), data_range=process.data_range)
    assert_close(terms[2:], torch.zeros(4), rtol=0, atol=1e-6)


def test_the_bound_trains_the_variance_alone():
    process = Diffusion(num_train_timesteps=T, variance_type="learned_range")
    x0, noise, t = batch()
    output = torch.cat([process.target(x0, noise, t), torch.zeros_like(x0)], dim=1).requires_grad_()
    training_losses(process, lambda xt, t: output, x0, t=t, noise=noise).loss.sum().backward()
    assert output.grad[:, :2].abs().max() == 0  # the squared error is 0 here
    assert output.grad[:, 2:].abs().flatten(1).amax(1).min() > 0
