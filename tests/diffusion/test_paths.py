"""Paths: levels and times against diffusers' schedulers, the density of training times against its own quantiles."""

import diffusers
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from unet_denoiser import Diffusion, DiffusionConfig


@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1000, 7, 1])
def test_flow_has_the_levels_of_diffusers(shift, steps):
    process = Diffusion(path="flow", shift=shift, num_train_timesteps=steps)
    peer = diffusers.FlowMatchEulerDiscreteScheduler(steps, shift)
    t = peer.sigmas.double().flip(0)
    assert_close(process.times, peer.timesteps.flip(0))
    assert_close(process.alphas.double() / (process.alphas + process.sigmas), 1 - t, rtol=1e-5, atol=1e-6)
    x0, noise, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, steps // 2, steps - 1])
    xt, (alpha, sigma) = process.add_noise(x0, noise, t), process.alpha_sigma(t, x0)
    expected = peer.scale_noise(x0, peer.timesteps.flip(0)[t], noise)
    assert_close(process.network_input(xt, alpha, sigma), expected, rtol=1e-5, atol=1e-5)
    assert_close(process.target(x0, noise, t), noise - x0)
    assert (np.diff(process.ratios) > 0).all()
    assert np.isfinite(process.ratios).all()


@pytest.mark.parametrize(
    "options", [{}, {"sigma_min": 0.01, "sigma_max": 10.0, "rho": 3.0, "sigma_data": 0.7, "num_train_timesteps": 9}]
)
def test_edm_has_the_levels_and_preconditioning_of_diffusers(options):
    process = Diffusion(path="edm", **options)
    peer = diffusers.EDMEulerScheduler(**options)
    peer.set_timesteps(process.num_train_timesteps)
    sigma = peer.sigmas[:-1].flip(0)
    assert_close(torch.from_numpy(process.ratios).float(), sigma)
    assert_close(process.times, sigma.log() / 4)
    t = torch.tensor([0, 4, 8])
    x0, noise, output = torch.randn(3, 3, 2)
    own, xt, (alpha, s) = x0 + sigma[t, None] * noise, process.add_noise(x0, noise, t), process.alpha_sigma(t, x0)
    assert_close(process.network_input(xt, alpha, s), peer.precondition_inputs(own, sigma[t, None]))
    expected = peer.precondition_outputs(own, output, sigma[t, None])
    assert_close(process.predict_x0(output, xt, alpha, s, clip=False), expected, rtol=1e-4, atol=1e-5)
    assert_close(process.predict_x0(process.target(x0, noise, t), xt, alpha, s, clip=False), x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_betas_are_those_of_the_levels(path):
    """The variance of ddpm's step from a level to the one before it, so that a learned variance works on any path."""
    process = Diffusion(path=path, variance_type="learned_range", num_train_timesteps=50)
    _, log_betas, *_ = process.bound._tables.double()
    expected = (process.alphas.double() ** 2)[:-1]
    assert_close((1 - log_betas.exp()).cumprod(0)[:-1], expected, rtol=1e-3, atol=1e-6)


# ---- density ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["vp", "flow", "edm"])
def test_uniform_density_draws_each_level_once(path):
    assert torch.equal(Diffusion(path=path, density="uniform").quantiles, torch.arange(1000))
    assert torch.equal(Diffusion(path=path, density_table=(2.0,)).quantiles, torch.arange(1000))
    assert torch.equal(Diffusion().quantiles, torch.arange(1000))


@pytest.mark.parametrize(
    ("options", "mean", "std"),
    [
        ({"path": "flow"}, 0.0, 1.0),
        ({"path": "flow", "density_mean": 0.5, "density_std": 0.7}, 0.5, 0.7),
        ({"path": "flow", "shift": 3.0}, np.log(3), 1.0),  # Esser et al. 2024: the shift moves the drawn t
        ({"path": "edm"}, -1.2, 1.2),
        ({"path": "edm", "density_mean": 0.0}, 0.0, 1.2),
        ({"path": "vp", "density": "log_normal"}, -1.2, 1.2),
    ],
)
def test_normal_densities_are_normal_in_the_logarithm_of_the_ratio(options, mean, std):
    """For flow that is the logit of t, as sigma / alpha = t / (1 - t)."""
    process = Diffusion(**options)
    drawn = np.log(process.ratios)[process.quantiles]
    inner = np.sort(drawn)[1:-1]  # quantiles 1/999 to 998/999
    assert (drawn[0], drawn[-1]) == (np.log(process.ratios[0]), np.log(process.ratios[-1]))
    assert (inner.mean(), inner.std()) == pytest.approx((mean, std), abs=0.02)
    assert np.median(drawn) == pytest.approx(mean, abs=0.02)
    for share, z in ((0.1587, -1), (0.8413, 1)):
        assert np.quantile(drawn, share) == pytest.approx(mean + z * std, abs=0.03)


def test_table_density_draws_the_ranges_as_often_as_it_says():
    counts = torch.bincount(Diffusion(density_table=(1, 0, 2, 1)).quantiles // 250, minlength=4)
    assert counts.tolist() == [250, 0, 500, 250]
    process = Diffusion(path="edm", density_table=(1, 3), num_train_timesteps=10)
    assert (process.quantiles >= 5).sum() in (7, 8)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_levels(count):
    for options in ({"path": "flow"}, {"path": "edm"}, {"density_table": (1, 2)}):
        process = Diffusion(**options, num_train_timesteps=count)
        assert process.quantiles.shape == (count,)
        assert set(process.quantiles.tolist()) <= set(range(count))


# ---- the file --------------------------------------------------------------------------------------------------------

FILES = [
    {"path": "flow"},
    {"path": "flow", "shift": 3.0, "density": "uniform", "clip_sample_range": None, "self_conditioning": True},
    {"path": "flow", "prediction_type": "v_prediction", "variance_type": "learned_range", "clip_sample_range": 2.0},
    {"path": "edm", "sigma_max": 20.0, "density_table": (1.0, 2.0)},
    {"path": "edm", "prediction_type": "v_prediction", "sigma_data": 1.0, "density_mean": 0.5},
    {"path": "edm", "prediction_type": "sample", "num_train_timesteps": 100},
    {"density": "log_normal", "density_std": 2.0},
]


@pytest.mark.parametrize("options", FILES)
def test_the_file_returns_the_process(tmp_path, options, caplog):
    process = Diffusion(**options)
    process.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert again.to_dict() == process.to_dict()
    for name in ("path", "prediction_type", "variance_type", "self_conditioning", "data_range", "sigma_data"):
        assert getattr(again, name) == getattr(process, name)
    for name in ("alphas", "sigmas", "times", "quantiles"):
        assert torch.equal(getattr(again, name), getattr(process, name))
    assert not caplog.records


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"path": "flow", "shift": 3.0}),
        (diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0), {"path": "flow", "shift": 2.0}),
        (diffusers.EDMEulerScheduler(sigma_max=20.0), {"path": "edm", "sigma_max": 20.0}),
        (diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.7), {"path": "edm", "sigma_data": 0.7}),
        (
            diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
            {"path": "edm", "prediction_type": "v_prediction", "sigma_data": 1.0},
        ),
    ],
)
def test_reads_the_files_of_diffusers(tmp_path, scheduler, expected, caplog):
    scheduler.save_config(tmp_path)
    process, expected = Diffusion.from_pretrained(tmp_path), Diffusion(**expected, clip_sample_range=None)
    assert process.to_dict() == expected.to_dict()
    assert torch.equal(process.alphas, expected.alphas)
    assert not caplog.records


def test_exponential_levels_of_a_file_are_kept(tmp_path):
    diffusers.EDMEulerScheduler(sigma_schedule="exponential").save_config(tmp_path)
    process = Diffusion.from_pretrained(tmp_path)
    assert np.diff(np.log(process.ratios)) == pytest.approx(np.log(40_000) / 999, rel=1e-3)
    assert Diffusion.from_dict(process.to_dict()).to_dict() == process.to_dict()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_data": 1.0},
            "is no scheduler of DDPM's family.*EDMEulerScheduler",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=True, which runs"),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
            "sigma_data=0.5 with prediction_type",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_mx": 20.0}, "sigma_mx=20.0 is an option of no scheduler"),
    ],
)
def test_files_that_would_be_misread_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Diffusion.from_dict(config)


def test_changes_of_a_file():
    saved = Diffusion(path="edm", clip_sample_range=2.0, num_train_timesteps=500).to_dict()
    changed = Diffusion.from_dict(saved, density_table=(1.0, 2.0), clip_sample_range=None)
    expected = {"clip_sample_range": None, "num_train_timesteps": 500, "density_table": (1.0, 2.0)}
    assert changed.to_dict() == Diffusion(path="edm", **expected).to_dict()
    other = Diffusion.from_dict(saved, path="flow", shift=3.0)
    assert (other.path, other.prediction_type, other.data_range) == ("flow", "flow", (-2.0, 2.0))
    assert other.num_train_timesteps == 500
    with pytest.raises(ValueError, match=r"shift=3\.0 is an option of path='flow'"):
        Diffusion.from_dict(saved, shift=3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "ve"}, "path='ve' is not one of 'vp', 'flow', 'edm'"),
        ({"shift": 3.0}, "shift=3.0 is an option of path='flow'; leave it out with 'vp'"),
        ({"path": "flow", "beta_end": 0.1}, "beta_end=0.1 is an option of path='vp'"),
        ({"path": "flow", "sigma_max": 20.0}, "sigma_max=20.0 is an option of path='edm'"),
        ({"path": "edm", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is an option of path='vp'"),
        ({"path": "flow", "prediction_type": "epsilon"}, "prediction_type='epsilon' with path='flow': use 'flow'"),
        ({"path": "edm", "sigma_min": 90.0}, r"sigma_min=90.0 and sigma_max=80.0 must be"),
        ({"path": "flow", "shift": 0.0}, "shift=0.0 must be positive"),
        ({"density": "uniform", "density_table": (1.0,)}, "density='uniform' and density_table=.*give one"),
        ({"density_table": (0.0, 0.0)}, "density_table=.*not all 0"),
        ({"density_mean": 1.0}, "density_mean=1.0 needs density='logit_normal'"),
        ({"path": "flow", "density_std": 0.0}, "density_std=0.0 must be finite and above 0"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**options)
