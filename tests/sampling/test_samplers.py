"""Every sampler against closed forms (a Gaussian's probability flow, a mixture's moments) and diffusers' own loop."""

from itertools import islice, pairwise
from typing import get_args

import diffusers
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from support.networks import small
from support.oracles import Mixture
from unet_denoiser import Diffusion, Guidance, Sampler, SamplingConfig, denoise, inpaint, invert, sample
from unet_denoiser.config.sampling import TimestepSpacing
from unet_denoiser.sampling import samplers
from unet_denoiser.sampling.loop import denoise_steps
from unet_denoiser.sampling.samplers import MEMORYLESS, SAMPLERS

STOCHASTIC = [name for name, kind in SAMPLERS.items() if kind.stochastic]
FINITE_START = [name for name, kind in SAMPLERS.items() if kind.needs_finite_start]
# error before the last step when the steps double from 40 to 80, at least divided by; two to the order is the ideal
CONVERGENCE = {
    "ddim": 1.9, "euler": 1.9,
    "pndm": 3.4, "ipndm": 3.4, "dpm++": 3.4, "dpm++2s": 3.3, "unipc": 6, "deis": 3.4, "heun": 3.4, "kdpm2": 3.4,
    "dpm++3m": 4, "dpm++3s": 6, "lms": 6,
}  # fmt: skip  # the multistep ones begin with a step of first order; unipc and lms get over it here


def steps(predict, process, z, name, count, **options):
    return list(denoise(predict, process, z, sampler=name, num_inference_steps=count, **options))


PATHS = {
    "vp": {"beta_schedule": "scaled_linear"},
    "flow": {"path": "flow", "shift": 2.0},
    "edm": {"path": "edm", "sigma_data": 0.6},
    "edm_v": {"path": "edm", "prediction_type": "v_prediction", "sigma_data": 1.0},
}


def gaussian_error(name, count, path="vp", **options):
    """Largest distance from the probability flow's exact x_t (linear in z, for a Gaussian) before the last step."""
    process, m, s = Diffusion(**PATHS[path], clip_sample_range=None), 0.3, 0.5
    z = torch.linspace(-2, 2, 41)[:, None]
    sampler = Sampler(SamplingConfig(name, count, **options), process)
    (a0, s0), (a1, s1) = sampler.alpha_sigma(0), sampler.alpha_sigma(len(sampler) - 1)
    exact = a1 * m + (z - a0 * m) * ((a1 * s) ** 2 + s1**2).sqrt() / ((a0 * s) ** 2 + s0**2).sqrt()
    return (steps(Mixture(process), process, z, name, count, **options)[-2].x - exact).abs().max().item()


@pytest.mark.parametrize("name", CONVERGENCE)
@pytest.mark.parametrize("path", PATHS)
def test_convergence_at_the_order_of_the_sampler(name, path):
    schedule = "exponential" if name == "dpm++3m" else "karras"  # with "karras" its error changes sign near 20 steps
    errors = [gaussian_error(name, n, path, sigma_schedule=schedule) for n in (40, 80)]
    assert errors[0] / errors[1] > CONVERGENCE[name]
    assert errors[1] < (0.05 if CONVERGENCE[name] < 2 else 0.01)


def test_every_deterministic_sampler_has_an_order():
    assert set(CONVERGENCE) == set(SAMPLERS) - set(STOCHASTIC)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("path", ["cosine", *PATHS])
def test_samples_have_the_distribution_of_the_data(name, path):
    """Weights, means and standard deviations of a mixture's two components, which do not overlap."""
    torch.manual_seed(0)
    process = Diffusion(**PATHS.get(path, {}), clip_sample_range=None)
    predict = Mixture(process, means=(-0.6, 0.6), stds=(0.1, 0.2), weights=(0.3, 0.7))
    count = 300 if name in ("ddpm", "euler_a", "sa") else 100
    # flow's first step down from pure noise is too long for this one
    options = {"sigma_schedule": "karras"} if (name, path) == ("sa", "flow") else {}
    x = steps(predict, process, torch.randn(4000, 1), name, count, **options)[-1].x
    low, high = x[x < 0], x[x >= 0]
    assert len(low) / len(x) == pytest.approx(0.3, abs=0.03)
    assert (low.mean().item(), high.mean().item()) == pytest.approx((-0.6, 0.6), abs=0.02)
    assert (low.std().item(), high.std().item()) == pytest.approx((0.1, 0.2), abs=0.015)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_prediction_type_gives_the_same_samples(name, prediction):
    z, options = torch.linspace(-2, 2, 9)[:, None], {"beta_schedule": "scaled_linear", "clip_sample_range": None}
    results = []
    for kind in (prediction, "v_prediction"):
        process, generators = (
            Diffusion(prediction_type=kind, **options),
            [torch.Generator().manual_seed(i) for i in range(9)],
        )
        results.append(steps(Mixture(process), process, z, name, 10, generators=generators)[-1].x)
    assert_close(*results, rtol=0, atol=1e-3)


def make_peer(name, steps):
    """Make diffusers' scheduler as its users do, from the schedule's name."""
    kind = SAMPLERS[name]
    options = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}
    options |= {"tau_func": lambda t: 1.0} if name == "sa" else dict(kind.options)
    scheduler = getattr(diffusers, kind.scheduler)(**options, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", [s for s in SAMPLERS if s not in ("ipndm", "dpm++2s", "dpm++3s")])
def test_unclipped_samples_equal_the_loop_of_diffusers(name):
    """Where the steps divide the trained ones. The three left out have another schedule (one) or spacing (two).

    The last step is diffusers' too, but of those that extrapolate in it or stop before sigma = 0.
    """
    process = Diffusion(prediction_type="epsilon", beta_schedule="scaled_linear")
    model, z = small(in_channels=1, out_channels=1), torch.randn(2, 1, 8, 8)
    model.output[2].weight.data.mul_(0.1)
    draws = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    ours = [s.x for s in steps(model, process, z, name, 8, clip_sample=False, generators=draws[0])]
    peer = make_peer(name, 8)
    sampler, found = Sampler(SamplingConfig(name, 8), process), []
    expected = z / float(sampler.alpha_sigma(0)[0]) if SAMPLERS[name].variance_exploding else z
    options = {"generator": draws[1]} if SAMPLERS[name].stochastic else {}
    for t in peer.timesteps:
        with torch.no_grad():
            output = model(peer.scale_model_input(expected, t), t.expand(2).float())
        expected = peer.step(output, t, expected, **options).prev_sample
        found.append(expected)
    assert len(ours) == len(found)
    if name not in ("ddpm", "pndm", "deis", "sa", "lms"):
        assert_close(ours[-1], found[-1], rtol=1e-3, atol=2e-3 * found[-1].abs().max().item())
    alpha, _ = sampler.alpha_sigma(len(ours) - 1)
    before = found[-2] * alpha if SAMPLERS[name].variance_exploding else found[-2]
    assert_close(ours[-2], before, rtol=1e-3, atol=2e-3 * before.abs().max().item())


PEERS = {  # the sampler that steps as diffusers' scheduler does, its spacing of the levels, and the process
    "FlowMatchEulerDiscreteScheduler": ("ddim", {}, {"path": "flow"}),
    "FlowMatchEulerDiscreteScheduler shifted": ("euler", {}, {"path": "flow", "shift": 3.0}),
    "EDMEulerScheduler": ("ddim", {"sigma_schedule": "karras"}, {"path": "edm"}),
    "EDMEulerScheduler v": ("euler", {"sigma_schedule": "karras"}, PATHS["edm_v"]),
    "EDMDPMSolverMultistepScheduler": ("dpm++", {"sigma_schedule": "karras"}, {"path": "edm", "sigma_data": 0.7}),
}


@pytest.mark.parametrize("peer", PEERS)
def test_samples_of_flow_and_edm_equal_the_loop_of_diffusers(peer):
    """From the process's own file; with a U-Net, so that the times that it is fed count."""
    (name, options, process), steps_ = PEERS[peer], 20
    process = Diffusion(**process, clip_sample_range=None)
    scheduler = getattr(diffusers, peer.split()[0]).from_config(process.to_dict())
    is_flow = "Flow" in peer
    scheduler.set_timesteps(
        **({"sigmas": np.linspace(1, 1 / steps_, steps_)} if is_flow else {"num_inference_steps": steps_})
    )
    model, z = small(in_channels=1, out_channels=1), torch.randn(2, 1, 8, 8)
    expected = z if is_flow else z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = expected if is_flow else scheduler.scale_model_input(expected, t)
        with torch.no_grad():
            expected = scheduler.step(model(seen, t.expand(2)), t, expected, return_dict=False)[0]
    *_, step = steps(model, process, z, name, 20, **options)
    assert_close(step.x, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_more_steps_are_better_where_they_do_not_divide_the_trained_ones():
    """diffusers' ddim counts back by 1000 // steps from timesteps that are further apart, and gets worse with more."""
    errors = [gaussian_error("ddim", n) for n in (80, 120, 160, 240)]
    assert all(coarse > fine for coarse, fine in pairwise(errors))


# ---- noise levels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("trailing", [999, 749, 499, 249]),
        ("leading", [750, 500, 250, 0]),
        ("linspace", [999, 666, 333, 0]),
        ("quadratic", [999, 561, 249, 61]),
    ],
)
def test_timestep_spacing(spacing, expected):
    sampler = Sampler(SamplingConfig("ddim", 4, timestep_spacing=spacing), Diffusion())
    assert sampler.timesteps.tolist() == expected
    assert not sampler.timesteps.is_floating_point()


@pytest.mark.parametrize("spacing", get_args(TimestepSpacing))
@pytest.mark.parametrize("total", [1, 2, 7, 40, 60, 1000])
def test_every_spacing_has_different_timesteps(spacing, total):
    process = Diffusion(num_train_timesteps=total)
    for count in range(1, min(total, 100) + 1):
        timesteps, _ = samplers.select_steps(SamplingConfig("ddim", count, timestep_spacing=spacing), process)
        assert len(timesteps) == count
        assert (np.diff(timesteps) < 0).all()
        assert timesteps.min() >= 0
        assert timesteps.max() < total


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_the_network_sees_the_timestep_of_its_sigma(name, schedule):
    """The levels are diffusers' for this schedule, and each call's timestep is the one that has that level."""
    process = Diffusion(beta_schedule="scaled_linear")
    peer = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02, **{f"use_{schedule}_sigmas": True}
    )
    peer.set_timesteps(12)
    sampler = Sampler(SamplingConfig(name, 12, sigma_schedule=schedule), process)
    levels = [sampler.alpha_sigma(i) for i in range(len(sampler))]
    ratios = torch.stack([sigma / alpha for alpha, sigma in levels])
    trained = ((1 - peer.alphas_cumprod) / peer.alphas_cumprod).sqrt().log().numpy()
    expected = np.interp(ratios.log().numpy(), trained, np.arange(1000))
    assert_close(sampler.timesteps.float(), torch.from_numpy(expected).float(), rtol=0, atol=0.02)
    steps = ratios[::2] if SAMPLERS[name].calls in ("heun", "middle") else ratios.unique().flip(0)
    assert_close(steps, peer.sigmas[:-1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", FINITE_START)
def test_starts_where_the_first_step_is_finite(name):
    """The cosine schedule's last sigma / alpha is 2e4; the first step would multiply a change of x0 by half of it."""
    sampler = Sampler(SamplingConfig(name, 25), Diffusion())
    alpha, sigma = sampler.alpha_sigma(0)
    assert 40 < sigma / alpha <= 80
    process = Diffusion(clip_sample_range=None)
    predict = Mixture(process, means=(-0.6, 0.6), stds=(0.1, 0.2), weights=(0.3, 0.7))
    x = steps(predict, process, torch.randn(500, 1), name, 25)[-1].x
    assert x.abs().max() < 1.6


@pytest.mark.parametrize("name", [s for s in SAMPLERS if s not in FINITE_START])
def test_zero_terminal_snr_gives_the_distribution_of_the_data(name):
    process = Diffusion(rescale_betas_zero_snr=True, clip_sample_range=None)
    torch.manual_seed(1)
    x = steps(Mixture(process), process, torch.randn(4000, 1), name, 100)[-1].x
    assert (x.mean().item(), x.std().item()) == pytest.approx((0.3, 0.5), abs=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_number_of_steps_ends_in_the_last_x0(name, count):
    process = Diffusion()
    seen = steps(lambda x, t: 0.9 * x, process, torch.randn(4, 3), name, count)
    calls = {"once": count, "pndm": count + (count > 1)}.get(SAMPLERS[name].calls, 2 * count - 1)
    assert len(seen) == len(Sampler(SamplingConfig(name, count), process)) == calls
    assert torch.equal(seen[-1].x, seen[-1].x0)
    assert seen[-1].x.isfinite().all()
    assert seen[-1].x.abs().max() <= 1


# ---- noise -----------------------------------------------------------------------------------------------------------


def test_eta_interpolates_between_ddim_and_ddpm():
    process = Diffusion(clip_sample_range=None, beta_schedule="scaled_linear")
    z = torch.linspace(-2, 2, 3)[:, None]

    def run(name, **options):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return steps(Mixture(process), process, z, name, 50, generators=generators, **options)[-1].x

    assert_close(run("ddim", eta=1.0), run("ddpm"), rtol=0, atol=1e-4)  # "fixed_small" is the posterior's variance
    assert not torch.allclose(run("ddim", eta=0.5), run("ddim"), atol=0.05)


@pytest.mark.parametrize("name", [*STOCHASTIC, "ddim"])
def test_a_sample_depends_on_its_seed_alone(name):
    """Equal in batches of 1, 3 and 64, for a network that rounds every sample alike in any batch."""
    model = small(in_channels=1, out_channels=1)
    model.forward = lambda x, t, **inputs: torch.tanh(x * 1.3 + t.view(-1, 1, 1, 1) / 1000)
    options = {"num_inference_steps": 5, "sampler": name} | ({"eta": 0.7} if name == "ddim" else {})
    together = sample(model, Diffusion(), seeds=range(64), **options)
    for size in (3, 1):
        seeds = range(7)
        assert torch.equal(sample(model, Diffusion(), seeds=seeds, batch_size=size, **options), together[:7])
    assert len({round(float(v), 4) for v in together[:, 0, 0, 0]}) > 50


@pytest.mark.parametrize("name", STOCHASTIC)
def test_two_seeds_draw_different_noise_on_the_way(name):
    """From the same start."""
    process = Diffusion(clip_sample_range=None)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    state = torch.get_rng_state()
    seen = steps(Mixture(process), process, torch.ones(2, 1), name, 10, generators=generators)
    assert (seen[-1].x[0] - seen[-1].x[1]).abs() > 1e-2
    assert torch.equal(torch.get_rng_state(), state)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "plms"}, "sampler='plms' is not one of 'ddpm'"),
        ({"eta": 1.5, "sampler": "ddim"}, r"eta=1.5 must be 0 \(deterministic\) to 1"),
        ({"eta": 0.5}, r"eta=0.5: sampler='dpm\+\+' does not take it; use 'ddim'"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' is not one of 'trailing'"),
        ({"sigma_schedule": "beta"}, "sigma_schedule='beta' is not one of 'karras', 'exponential'"),
        ({"sigma_schedule": "karras", "timestep_spacing": "leading"}, "timestep_spacing='leading' has no effect with"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize("name", FINITE_START)
def test_zero_terminal_snr_is_refused_where_the_sampler_cannot(name):
    with pytest.raises(ValueError, match=rf"sampler='{name}' has no finite start.*use 'dpm\+\+'"):
        Sampler(SamplingConfig(name, 8), Diffusion(rescale_betas_zero_snr=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_schedule": "karras"}, "sigma_schedule='karras' has no finite start.*leave it out"),
        ({"timestep_spacing": "leading"}, "timestep_spacing='leading' leaves out the last timestep.*use 'trailing'"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be 1 to 1000 for sampler='dpm"),
    ],
)
def test_refuses_what_the_process_cannot(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(SamplingConfig(**options), Diffusion(rescale_betas_zero_snr=True))


def test_lms_without_scipy_says_so(monkeypatch):
    monkeypatch.setattr("unet_denoiser.sampling.samplers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"sampler='lms' needs SciPy.*'dpm\+\+' does without"):
        Sampler(SamplingConfig("lms"), Diffusion())


# ---- one scheduler for a generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_of_one_sampler_do_not_affect_each_other(name):
    """Also after a batch that was left in the middle."""
    sampler, guidance = Sampler(SamplingConfig(name, 6), Diffusion()), Guidance(lambda x, t: 0.5 * x)

    def run(count):
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        z = torch.stack([torch.randn(2, 4, 4, generator=g) for g in generators])
        return [step.x for step in islice(denoise_steps(guidance, sampler, z, generators=generators), count)]

    first, _, again = run(None), run(3), run(None)
    assert len(first) == len(sampler)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("name", MEMORYLESS)
def test_a_memoryless_sampler_repeats_any_step(name):
    sampler, x, x0 = Sampler(SamplingConfig(name, 6), Diffusion()), torch.randn(1, 2, 4, 4), torch.rand(1, 2, 4, 4)

    def step(i):
        return sampler.step(i, x, x0, generators=[torch.Generator().manual_seed(0)])

    in_turn = [step(i) for i in range(6)]
    for i in (4, 4, 1, 0, 0, 5, 2):
        assert torch.equal(step(i), in_turn[i])
    alone = Sampler(SamplingConfig(name, 6), Diffusion(), first_step=4)
    assert torch.equal(alone.step(0, x, x0, generators=[torch.Generator().manual_seed(0)]), in_turn[4])


@pytest.fixture
def count_schedulers(monkeypatch):
    """The schedulers that are made while the test runs."""
    made, make = [], samplers._make_scheduler
    monkeypatch.setattr(samplers, "_make_scheduler", lambda *args: made.append(make(*args)) or made[-1])
    return made


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_scheduler_for_all_steps_repeats_and_batches(count_schedulers, batch_size):
    model, process, x = small(), Diffusion(), torch.rand(4, 3, 8, 8)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    options = {"batch_size": batch_size, "num_inference_steps": 3}
    calls = [
        lambda: sample(model, process, seeds=range(4), **options),
        lambda: inpaint(model, process, x, mask, seeds=range(4), resample=3, sampler="euler", **options),
        lambda: invert(model, process, x, **options),
        lambda: list(denoise(lambda x, t: x, process, x, num_inference_steps=3)),
    ]
    for count, call in enumerate(calls, start=1):
        call()
        assert len(count_schedulers) == count
