"""The process: schedule against closed forms and diffusers, targets, loss, the file, refusals."""

import diffusers
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def test_linear_schedule_is_ddpms():
    process = Diffusion()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = (1 - betas).cumprod(0)
    assert_close(process.alphas.double() ** 2, expected, rtol=1e-4, atol=1e-8)
    assert_close(process.alphas**2 + process.sigmas**2, torch.ones(1000))
    assert process.prediction_type == "epsilon"


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
    process = Diffusion()
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
    noise_loss = Diffusion().loss(lambda x, t: torch.zeros_like(x), torch.zeros(2000, 16)).mean()
    assert noise_loss.item() == pytest.approx(1.0, abs=0.03)  # the variance of the noise


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_every_cell_is_finite_or_refused(schedule, prediction, zero_snr):
    options = {"beta_schedule": schedule, "prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    if zero_snr and prediction == "epsilon":
        with pytest.raises(ValueError, match=r"prediction_type='epsilon'.*use 'v_prediction'"):
            Diffusion(**options)
        return
    process = Diffusion(**options)
    assert (process.alphas[-1] == 0) == zero_snr
    t = torch.arange(1000)
    loss = process.loss(lambda x, t: torch.zeros_like(x), torch.rand(1000, 3), t=t)
    assert loss.isfinite().all()


def test_file_is_diffusers_and_comes_back(tmp_path):
    process = Diffusion(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample_range=2.0)
    process.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert again.to_dict() == process.to_dict()
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "noise"}, "prediction_type='noise' is not one of 'epsilon'"),
        ({"beta_schedule": "cosine"}, "beta_schedule='cosine' is not one of 'linear'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 must be at least 1"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5 and beta_end=0.1"),
        ({"clip_sample_range": -1.0}, "clip_sample_range=-1.0 must be positive"),
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
