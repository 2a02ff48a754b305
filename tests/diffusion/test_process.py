"""The process: schedule against closed forms and diffusers, targets, loss, the file, refusals."""

import math
from itertools import product
from typing import get_args

import diffusers
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion, TrainingConfig, UNetConfig, denoise, preset
from unet_denoiser.config.base import LossWeightingName
from unet_denoiser.diffusion.loss import draw_noise
from unet_denoiser.diffusion.loss_weighting import LossWeighting
from unet_denoiser.sampling.samplers import SAMPLERS

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def test_linear_schedule_is_ddpms():
    process = Diffusion(beta_schedule="linear")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = (1 - betas).cumprod(0)
    assert_close(process.alphas.double() ** 2, expected, rtol=1e-4, atol=1e-8)
    assert_close(process.alphas**2 + process.sigmas**2, torch.ones(1000))


def test_cosine_schedule_is_nichol_and_dhariwals():
    t = torch.arange(1, 999, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    expected = f / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    process = Diffusion(beta_schedule="squaredcos_cap_v2")
    assert_close((process.alphas.double() ** 2)[:998], expected, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_targets_are_diffusers(schedule, prediction):
    process = Diffusion(beta_schedule=schedule, prediction_type=prediction)
    peer = diffusers.DDPMScheduler(beta_schedule=schedule)
    x0, noise, t = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), torch.tensor([0, 10, 500, 999])
    xt = process.add_noise(x0, noise, t)
    assert_close(xt, peer.add_noise(x0, noise, t))
    target = process.target(x0, noise, t)
    expected = {"epsilon": noise, "sample": x0, "v_prediction": peer.get_velocity(x0, noise, t)}[prediction]
    assert_close(target, expected)
    # the target stands for the x0 it was made of; at the noisy end only as far as float32 can tell
    for i, step in enumerate(t[:3].tolist()):
        x0_again = process.predict_x0(target[i], xt[i], process.alphas[step], process.sigmas[step], clip=False)
        assert_close(x0_again, x0[i], rtol=1e-4, atol=1e-4)


def test_x0_is_clipped_to_the_data_range():
    output, xt, alpha, sigma = torch.tensor([-3.0, 0.1, 3.0]), torch.zeros(3), torch.tensor(0.6), torch.tensor(0.8)
    process = Diffusion(prediction_type="sample", clip_sample_range=0.5)
    assert process.data_range == (-0.5, 0.5)
    assert process.predict_x0(output, xt, alpha, sigma).tolist() == pytest.approx([-0.5, 0.1, 0.5])
    assert process.predict_x0(output, xt, alpha, sigma, clip=False).tolist() == pytest.approx([-3.0, 0.1, 3.0])
    unbounded = Diffusion(prediction_type="sample", clip_sample_range=None)
    assert unbounded.data_range is None
    assert unbounded.predict_x0(output, xt, alpha, sigma).tolist() == pytest.approx([-3.0, 0.1, 3.0])


def test_loss_is_the_mean_square_per_sample():
    process = Diffusion(prediction_type="epsilon")
    x0, noise, t = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 400, 999])
    given = {}

    def model(x, t, **inputs):
        given.update(inputs, x=x, t=t)
        return torch.full_like(x, 0.25)

    loss = process.loss(model, x0, t=t, noise=noise, class_labels=t)
    assert_close(loss, ((noise - 0.25) ** 2).mean((1, 2, 3)))
    assert_close(given["x"], process.add_noise(x0, noise, t))
    assert given["class_labels"] is t


def test_loss_draws_all_timesteps_and_standard_noise():
    process = Diffusion(prediction_type="sample")
    seen = []
    process.loss(lambda x, t: seen.append(t) or torch.zeros_like(x), torch.zeros(20_000, 1))
    assert (seen[0].min(), seen[0].max()) == (0, 999)
    assert seen[0].float().mean().item() == pytest.approx(499.5, abs=8)
    noise_loss = (
        Diffusion(prediction_type="epsilon").loss(lambda x, t: torch.zeros_like(x), torch.zeros(2000, 16)).mean()
    )
    assert noise_loss.item() == pytest.approx(1.0, abs=0.03)  # the variance of the noise


class Linear(torch.nn.Module):
    """A network with one parameter, and whatever channels a process wants."""

    def __init__(self, process, data_channels):
        super().__init__()
        self.out_channels = process.channels(data_channels)["out_channels"]
        self.gain = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return self.gain * x.mean(1, keepdim=True).expand(-1, self.out_channels, *x.shape[2:])


OUTPUTS = list(product(("fixed_small", "fixed_large", "learned_range"), (False, True)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_cell_is_finite_or_refused(schedule, prediction, zero_snr):
    """Losses and gradients at the first, a middle and the last timestep, and a few steps of every sampler.

    For every variance, with and without self-conditioning, under every weighting.
    """
    options = {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    if zero_snr and prediction == "epsilon":
        with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*use 'v_prediction'"):
            Diffusion(**options)
        return
    for variance, self_conditioning in OUTPUTS:
        process = Diffusion(**options, variance_type=variance, self_conditioning=self_conditioning)
        assert (process.alphas[-1] == 0) == zero_snr
        network = Linear(process, 2)
        for name in get_args(LossWeightingName):
            config = TrainingConfig(loss_weighting=name)
            if (name, prediction) == ("truncated_snr", "epsilon"):
                with pytest.raises(ValueError, match=r"loss_weighting='truncated_snr' with prediction_type='epsilon'"):
                    LossWeighting(prediction, process.snr, config)
                continue
            weighting = LossWeighting(prediction, process.snr, config)
            t, x0 = torch.tensor([0, 1, 500, 998, 999]), torch.rand(5, 2, 3, 3)
            losses = process.losses(network, x0, t=t, noise=draw_noise(x0, 0.1), weighting=weighting)
            network.gain.grad = None
            losses.loss.mean().backward()
            weighting.step()
            assert losses.loss.isfinite().all()
            assert losses.error.isfinite().all()
            assert network.gain.grad.isfinite()
            assert network.gain.grad.abs() > 0
        for sampler, kind in SAMPLERS.items():
            if not (zero_snr and kind.bounded):
                *_, last = denoise(network, process, torch.randn(2, 2, 3, 3), sampler=sampler, num_inference_steps=3)
                assert last.x.isfinite().all()
                assert last.x.abs().max() <= 1.001  # the range of the data


# ---- offset noise, learned variance, self-conditioning ---------------------------------------------------------------


def test_offset_noise_is_shared_by_the_pixels_of_a_channel():
    x0 = torch.zeros(500, 2, 16, 16)
    noise = draw_noise(x0, 0.5, torch.Generator().manual_seed(0))
    means = noise.mean((2, 3))
    assert means.std().item() == pytest.approx(math.sqrt(0.25 + 1 / 256), rel=0.1)
    assert (noise - means[:, :, None, None]).std().item() == pytest.approx(1.0, rel=0.02)
    assert torch.corrcoef(means.T)[0, 1].abs() < 0.2  # each channel has a draw of its own
    assert torch.equal(noise, draw_noise(x0, 0.5, torch.Generator().manual_seed(0)))
    assert draw_noise(x0).mean((2, 3)).std().item() == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, (3, 3)),
        ({"variance_type": "learned_range"}, (3, 6)),
        ({"self_conditioning": True}, (6, 3)),
        ({"self_conditioning": True, "variance_type": "learned_range"}, (6, 6)),
    ],
)
def test_channels(options, channels):
    process, config = Diffusion(**options), UNetConfig(in_channels=channels[0], out_channels=channels[1])
    assert tuple(process.channels(3).values()) == channels
    assert process.channels(3, 4)["in_channels"] == channels[0] + 4
    assert process.check_channels(config) == 3
    assert process.check_channels(config, 3) == 3
    for other in ({}, {"variance_type": "learned_range"}, {"self_conditioning": True}):
        if other != options:
            with pytest.raises(ValueError, match=r"_channels=\d, but the (samples|data) have"):
                Diffusion(**other).check_channels(config, 3)


def test_a_learned_variance_is_not_taken_for_something_else():
    with pytest.raises(ValueError, match=r"in_channels=3.*a learned variance needs variance_type='learned_range'"):
        Diffusion().check_channels(preset("adm-256"))
    with pytest.raises(ValueError, match=r"out_channels=6.*a learned variance needs variance_type='learned_range'"):
        Diffusion().check_channels(preset("adm-256"), 3)
    with pytest.raises(ValueError, match=r"out_channels=3.*variance_type='learned_range'.*it must be 6"):
        Diffusion(variance_type="learned_range").check_channels(preset("ddpm-256"), 3)
    assert Diffusion(variance_type="learned_range").check_channels(preset("adm-256")) == 3
    assert Diffusion(variance_type="learned_range").check_channels(preset("adm-up-64-256"), concat_channels=3) == 3
    with pytest.raises(ValueError, match="output has 2 channels; variance_type='fixed_small' needs 1"):
        Diffusion().loss(lambda x, t: x.repeat(1, 2, 1, 1), torch.zeros(2, 1, 4, 4))


def test_some_samples_see_a_first_estimate():
    """The clipped x0 of a pass without an estimate and without gradients, with the same conditions; zeros otherwise."""
    process, calls = Diffusion(self_conditioning=True, prediction_type="v_prediction"), []
    gain = torch.tensor(0.5, requires_grad=True)

    def model(x, t, labels, drop):
        calls.append({"x": x, "t": t, "labels": labels, "drop": drop["labels"], "grad": torch.is_grad_enabled()})
        return gain * x[:, :1]

    x0, noise, t = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2), torch.arange(4) * 200
    labels, seeing = torch.arange(4), torch.tensor([True, False, False, True])
    options = {"t": t, "noise": noise, "labels": labels, "drop": {"labels": labels > 1, "none": None}}
    losses = process.losses(model, x0, self_condition=seeing, **options)
    first, second = calls
    xt = process.add_noise(x0, noise, t)
    assert first["labels"].tolist() == [0, 3]
    assert (first["grad"], second["grad"]) == (False, True)
    assert torch.equal(first["t"], t[[0, 3]])
    assert first["drop"].tolist() == [False, True]
    assert_close(first["x"], torch.cat([xt, torch.zeros_like(xt)], dim=1)[[0, 3]])
    estimate = process.predict_x0(0.5 * xt, xt, *process._at(t, xt)).detach()
    estimate[1:3] = 0
    assert_close(second["x"], torch.cat([xt, estimate], dim=1))
    losses.loss.mean().backward()
    with torch.no_grad():
        direct = 2 * ((gain * xt - process.target(x0, noise, t)) * xt).mean()
    assert_close(gain.grad, direct)  # nothing came through the estimate


def test_half_of_the_samples_see_an_estimate_and_the_network_always_runs_twice():
    process, seen = Diffusion(self_conditioning=True), []

    def model(x, t):
        seen.append(x[:, 1:].flatten(1).any(1))
        return x[:, :1]

    for _ in range(100):
        process.losses(model, torch.rand(2, 1, 2, 2))
    assert len(seen) == 200
    assert not torch.cat(seen[::2]).any()
    assert torch.cat(seen[1::2]).float().mean().item() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("more", [{}, {"variance_type": "learned_range", "self_conditioning": True}])
def test_file_is_diffusers_and_comes_back(tmp_path, more, caplog):
    options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample_range": 2.0}
    process = Diffusion(**options, **more)
    process.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert again.to_dict() == process.to_dict()
    assert (again.variance_type, again.self_conditioning) == (process.variance_type, process.self_conditioning)
    assert not caplog.records
    assert_close(again.alphas, process.alphas, rtol=0, atol=0)
    peer = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert peer.config.prediction_type == "v_prediction"
    assert_close(peer.alphas_cumprod, process.scheduler.alphas_cumprod, rtol=0, atol=0)


def test_reads_a_foreign_schedulers_file(tmp_path):
    diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_config(
        tmp_path
    )
    process = Diffusion.from_pretrained(tmp_path)
    assert process.prediction_type == "v_prediction"
    assert_close(process.alphas, Diffusion(beta_schedule="scaled_linear").alphas)


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small_log", "fixed_small"), ("fixed_large", "fixed_large")])
def test_reads_a_foreign_variance(tmp_path, theirs, ours):
    diffusers.DDPMScheduler(variance_type=theirs).save_config(tmp_path)
    assert Diffusion.from_pretrained(tmp_path).variance_type == ours
    diffusers.DPMSolverMultistepScheduler().save_config(tmp_path)  # has none
    assert Diffusion.from_pretrained(tmp_path).variance_type == "fixed_small"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type='noise' is not one of 'epsilon'"),
        ({"beta_schedule": "cosine"}, "beta_schedule='cosine' is not one of 'linear'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be at least 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5 and beta_end=0.1"),
        ({"clip_sample_range": -1.0}, "clip_sample_range=-1.0 must be positive"),
        ({"variance_type": "learned"}, "variance_type='learned' is not one of 'fixed_small'"),
        ({"variance_type": "learned_range", "num_train_timesteps": 1}, "variance_type='learned_range'.*no range"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


def test_refuses_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Diffusion.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"beta_schedule": "laplace"}')
    with pytest.raises(ValueError, match="beta_schedule='laplace'"):
        Diffusion.from_pretrained(tmp_path)
