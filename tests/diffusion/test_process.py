"""The process: schedule against closed forms and diffusers, targets, channels, the file, refusals."""

import diffusers
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion, UNetConfig, preset

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def test_linear_schedule_equals_ddpm():
    process = Diffusion(beta_schedule="linear")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = (1 - betas).cumprod(0)
    assert_close(process.alphas.double() ** 2, expected, rtol=1e-4, atol=1e-8)
    assert_close(process.alphas**2 + process.sigmas**2, torch.ones(1000))


def test_cosine_schedule_equals_nichol_and_dhariwal():
    t = torch.arange(1, 999, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    expected = f / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    process = Diffusion(beta_schedule="squaredcos_cap_v2")
    assert_close((process.alphas.double() ** 2)[:998], expected, rtol=2e-3, atol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_add_noise_and_target_equal_diffusers(schedule, prediction):
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


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, (3, 3)),
        ({"variance_type": "learned_range"}, (3, 6)),
        ({"self_conditioning": True}, (6, 3)),
        ({"self_conditioning": True, "variance_type": "learned_range"}, (6, 6)),
    ],
)
def test_channels_of_the_network(options, channels):
    process, config = Diffusion(**options), UNetConfig(in_channels=channels[0], out_channels=channels[1])
    assert tuple(process.channels(3).values()) == channels
    assert process.channels(3, 4)["in_channels"] == channels[0] + 4
    assert process.check_channels(config) == process.check_channels(config, 3) == process.data_channels(config) == 3
    assert process.concat_channels(config) == 0
    for other in ({}, {"variance_type": "learned_range"}, {"self_conditioning": True}):
        if other != options:
            with pytest.raises(ValueError, match=r"_channels=\d, but the (samples|data) have"):
                Diffusion(**other).check_channels(config, 3)


def test_refuses_networks_with_other_channels():
    with pytest.raises(ValueError, match=r"in_channels=3.*a learned variance needs variance_type='learned_range'"):
        Diffusion().check_channels(preset("adm-256"))
    with pytest.raises(ValueError, match=r"out_channels=6.*a learned variance needs variance_type='learned_range'"):
        Diffusion().check_channels(preset("adm-256"), 3)
    with pytest.raises(ValueError, match=r"out_channels=3.*variance_type='learned_range'.*it must be 6"):
        Diffusion(variance_type="learned_range").check_channels(preset("ddpm-256"), 3)
    assert Diffusion(variance_type="learned_range").check_channels(preset("adm-256")) == 3
    assert Diffusion(variance_type="learned_range").check_channels(preset("adm-up-64-256"), concat_channels=3) == 3


@pytest.mark.parametrize("more", [{}, {"variance_type": "learned_range", "self_conditioning": True}])
def test_file_round_trip_also_by_diffusers(tmp_path, more, caplog):
    options = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "clip_sample_range": 2.0}
    process = Diffusion(**options, **more)
    process.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").read_text() == process.scheduler.to_json_string()
    assert again.to_dict() == process.to_dict()
    assert (again.variance_type, again.self_conditioning) == (process.variance_type, process.self_conditioning)
    assert not caplog.records
    assert_close(again.alphas, process.alphas, rtol=0, atol=0)
    peer = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert peer.config.prediction_type == "v_prediction"
    assert_close(peer.alphas_cumprod, process.scheduler.alphas_cumprod, rtol=0, atol=0)


def test_reads_the_file_of_another_scheduler(tmp_path):
    diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_config(
        tmp_path
    )
    process = Diffusion.from_pretrained(tmp_path)
    assert process.prediction_type == "v_prediction"
    assert_close(process.alphas, Diffusion(beta_schedule="scaled_linear").alphas)


OTHERS = [
    "DDIM",
    "DEISMultistep",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "LCM",
    "PNDM",
    "TCD",
    "UniPCMultistep",
]


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_file_lacks_is_the_default_of_the_scheduler_that_wrote_it(name):
    scheduler = getattr(diffusers, f"{name}Scheduler")()
    process = Diffusion.from_dict({"_class_name": type(scheduler).__name__})
    assert_close(process.alphas**2, scheduler.alphas_cumprod, rtol=1e-6, atol=1e-6)
    assert (process.data_range is not None) == scheduler.config.get("clip_sample", False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "CogVideoXDDIMScheduler"}, "'CogVideoXDDIMScheduler' is no scheduler of"),
        ({"beta_ehd": 0.02}, "beta_ehd=0.02 is an option of no scheduler"),
        ({"thresholding": True}, "thresholding=True"),
    ],
)
def test_files_that_would_be_misread_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_dict(config)


def test_reads_the_first_name_of_the_prediction_type():
    assert Diffusion.from_dict({"predict_epsilon": False}).prediction_type == "sample"
    assert Diffusion.from_dict({"predict_epsilon": True}).prediction_type == "epsilon"


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small_log", "fixed_small"), ("fixed_large", "fixed_large")])
def test_reads_the_variance_type_of_other_schedulers(tmp_path, theirs, ours):
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
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**options)


def test_refuses_missing_and_unknown_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        Diffusion.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text('{"beta_schedule": "laplace"}')
    with pytest.raises(ValueError, match="beta_schedule='laplace'"):
        Diffusion.from_pretrained(tmp_path)
