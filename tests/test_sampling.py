"""The reverse process against the closed form of a Gaussian, and against diffusers' own loop; seeds and refusals."""

from itertools import pairwise

import diffusers
import pytest
import torch
from torch.testing import assert_close

from helpers import small
from unet_denoiser import Diffusion, Sampler, SamplingConfig, Start, denoise, sample
from unet_denoiser.samplers import SAMPLERS

PREDICTIONS = ("epsilon", "v_prediction", "sample")
MEAN, STD = 0.3, 0.5


def gaussian_oracle(process):
    """What a perfect network outputs for data from N(MEAN, STD^2): the posterior mean in closed form."""

    def predict(x, t):
        alpha, sigma = process.alphas[t.long()].view(-1, 1), process.sigmas[t.long()].view(-1, 1)
        x0 = MEAN + STD**2 * alpha * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        noise = (x - alpha * x0) / sigma
        return {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[process.prediction_type]

    return predict


def run(predict, process, noise, **options):
    *_, last = denoise(predict, process, noise, **options)
    return last.x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaussian(sampler, prediction, schedule):
    """The deterministic samplers map noise z to MEAN + STD z (the probability flow); ddpm ends in the distribution."""
    process = Diffusion(prediction_type=prediction, beta_schedule=schedule, clip_sample_range=None)
    # steps such that the sampler's own error is well below the tolerance
    steps, tolerance = {"ddpm": (1000, 0.03), "ddim": (250, 0.02), "euler": (250, 0.02)}.get(sampler, (100, 0.02))
    z = torch.randn(4000, 1)
    x = run(gaussian_oracle(process), process, z, sampler=sampler, num_inference_steps=steps)
    if sampler == "ddpm":
        assert x.mean().item() == pytest.approx(MEAN, abs=tolerance)
        assert x.std().item() == pytest.approx(STD, abs=tolerance)
    else:
        start = process.alphas[-1]  # x_T = z is taken for alpha_T x0 + sigma_T z: off by alpha_T (x0 - z)
        assert_close(x, MEAN + STD * z, rtol=0, atol=tolerance * 2 + float(start) * 6)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm++", "unipc", "heun"])
def test_more_steps_are_more_exact(sampler):
    """The error falls as the steps double, and the second-order samplers' is a fraction of ddim's.

    Their last step, from the lowest timestep to the data, is of first order in all of them.
    """
    process = Diffusion(beta_schedule="scaled_linear", clip_sample_range=None)
    z = torch.linspace(-2, 2, 41)[:, None]
    exact = run(gaussian_oracle(process), process, z, sampler="heun", num_inference_steps=1000)

    def error(name, steps):
        x = run(gaussian_oracle(process), process, z, sampler=name, num_inference_steps=steps)
        return (x - exact).abs().max().item()

    errors = [error(sampler, n) for n in (10, 20, 40)]
    assert all(coarse > 1.5 * fine for coarse, fine in pairwise(errors))
    if sampler not in ("ddim", "euler"):
        assert errors[1] < 0.4 * error("ddim", 20)


PEERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_unclipped_equals_diffusers_own_loop(sampler, prediction):
    """Handing over velocities changes nothing: the same as the scheduler fed with the network's raw output."""
    process = Diffusion(prediction_type=prediction, beta_schedule="linear")
    model, z = small(in_channels=1, out_channels=1), torch.randn(2, 1, 8, 8)
    model.output[2].weight.data.mul_(0.1)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x = run(model, process, z, sampler=sampler, num_inference_steps=6, clip_sample=False, generators=generators)
    options = {"prediction_type": prediction, "beta_schedule": "linear", "timestep_spacing": "trailing"}
    options |= {"beta_start": 1e-4, "beta_end": 0.02}
    peer = PEERS[sampler](**options, **({"clip_sample": False} if sampler in ("ddpm", "ddim") else {}))
    peer.set_timesteps(6)
    expected = z * peer.init_noise_sigma
    draws = {"generator": [torch.Generator().manual_seed(i) for i in range(2)]} if sampler == "ddpm" else {}
    for t in peer.timesteps:
        with torch.no_grad():
            output = model(peer.scale_model_input(expected, t), t.expand(2))
        expected = peer.step(output, t, expected, **draws).prev_sample
    assert_close(x, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_variance_of_ddpm_is_diffusers(variance, prediction):
    """Also with fewer steps than trained, where the range of a learned variance is that of the longer steps."""
    options = {"prediction_type": prediction, "variance_type": variance, "beta_schedule": "linear"}
    process = Diffusion(**options)
    model, z = small(in_channels=1, **{"out_channels": process.channels(1)["out_channels"]}), torch.randn(2, 1, 8, 8)
    model.output[2].weight.data.mul_(0.1)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sampling = {"sampler": "ddpm", "num_inference_steps": 6, "clip_sample": False, "generators": generators}
    steps = [step.x for step in denoise(model, process, z, **sampling)]
    peer = diffusers.DDPMScheduler(**options, timestep_spacing="trailing", clip_sample=False)
    peer.set_timesteps(6)
    expected, draws = z, [torch.Generator().manual_seed(i) for i in range(2)]
    for t, x in zip(peer.timesteps, steps, strict=True):
        with torch.no_grad():
            output = model(expected, t.expand(2))
        step = peer.step(output, t, expected, generator=draws)
        expected = step.prev_sample if t != peer.timesteps[-1] else step.pred_original_sample
        assert_close(x, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "ddpm"])
def test_the_other_samplers_do_without_the_variance(sampler):
    process, plain = Diffusion(variance_type="learned_range"), Diffusion()
    z = torch.randn(3, 2, 4, 4)
    x = run(lambda x, t: torch.cat([0.5 * x, x], 1), process, z, sampler=sampler, num_inference_steps=5)
    assert_close(x, run(lambda x, t: 0.5 * x, plain, z, sampler=sampler, num_inference_steps=5), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_self_conditioning_sees_the_x0_of_the_step_before(sampler):
    process, seen = Diffusion(self_conditioning=True, beta_schedule="squaredcos_cap_v2"), []

    def predict(x, t):
        seen.append(x)
        return 0.7 * x[:, :2] - 0.1 * x[:, 2:]

    z = torch.randn(3, 2, 4, 4)
    options = {"sampler": sampler, "num_inference_steps": 5, "clip_sample": False}
    steps = list(denoise(predict, process, z, **options))
    assert len(steps) == len(seen)
    assert not seen[0][:, 2:].any()
    for step, x in zip(steps, seen[1:], strict=False):
        assert_close(x[:, 2:], step.x0.clamp(-1, 1), rtol=0, atol=0)  # clipped as in training


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_samples_with_variance_and_self_conditioning(sampler, guidance_scale):
    process = Diffusion(self_conditioning=True, variance_type="learned_range")
    model, labels = small(num_classes=5, **process.channels(2)), torch.tensor([1, 2, 3])
    options = {"sampler": sampler, "num_inference_steps": 3, "guidance_scale": guidance_scale}
    x = sample(model, process, seeds=range(3), class_labels=labels, **options)
    assert x.shape == (3, 2, 8, 8)
    assert x.isfinite().all()
    alone = sample(model, process, seeds=[1], class_labels=labels[1:2], **options)
    assert_close(alone, x[1:2], rtol=5e-3, atol=5e-3)  # a random network enlarges what the kernels round


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_bounds_every_sampler(sampler):
    """A network that knows nothing sends unclipped samples far out of the data; clipped ones stay in it."""
    process = Diffusion(prediction_type="epsilon")
    z = torch.randn(8, 4)

    def wrong(x, t):
        return 0.9 * x

    x = run(wrong, process, z, sampler=sampler, num_inference_steps=10)
    unclipped = run(wrong, process, z, sampler=sampler, num_inference_steps=10, clip_sample=False)
    assert x.abs().max() <= 1 + 1e-5
    assert unclipped.abs().max() > 2
    for step in denoise(wrong, process, z, sampler=sampler, num_inference_steps=10):
        assert step.x0.abs().max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_steps_is_finite(sampler, steps):
    process = Diffusion(clip_sample_range=None)
    seen = list(
        denoise(gaussian_oracle(process), process, torch.randn(4, 1), sampler=sampler, num_inference_steps=steps)
    )
    assert len(seen) == (2 * steps - 1 if sampler == "heun" else steps)
    assert seen[0].t == 999
    assert seen[-1].x.isfinite().all()


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "heun"])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite(sampler, prediction):
    process = Diffusion(rescale_betas_zero_snr=True, prediction_type=prediction)
    x = run(lambda x, t: 0.1 * x, process, torch.randn(4, 1), sampler=sampler, num_inference_steps=8)
    assert x.isfinite().all()


def test_zero_terminal_snr_is_refused_where_the_sampler_cannot():
    with pytest.raises(ValueError, match=r"sampler='heun'.*use 'dpm\+\+'"):
        Sampler(SamplingConfig("heun", 8), Diffusion(rescale_betas_zero_snr=True, prediction_type="sample"))


# ---- starting later, and editing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "ddpm"])
def test_starting_later_from_the_same_place(sampler):
    """What the steps give is x_t in the process's scale: going on from a step's is the same as never having stopped.

    Up to the memory of the multistep samplers, which starts anew: dpm++ and unipc are compared from the noise on.
    """
    process, first = Diffusion(clip_sample_range=None), 0 if sampler in ("dpm++", "unipc") else 3
    options = {"sampler": sampler, "num_inference_steps": 6}
    z = torch.randn(5, 1)
    steps = list(denoise(gaussian_oracle(process), process, z, **options))
    x = steps[2 * first - 1 if sampler == "heun" else first - 1].x if first else z
    assert_close(run(gaussian_oracle(process), process, x, first_step=first, **options), steps[-1].x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_start_noises_data_to_the_level_of_its_step(sampler):
    """From data of the right distribution, noised to any level, samples have it again."""
    process = Diffusion(clip_sample_range=None, beta_schedule="linear")
    model, seen = small(in_channels=1, out_channels=1, dims=1, image_size=4000, attention_resolutions=()), []
    oracle = gaussian_oracle(process)
    model.forward = lambda x, t: seen.append(x) or oracle(x.flatten(1).T, t.expand(4000)).T.view_as(x)
    data = MEAN + STD * torch.randn(1, 1, 4000)
    options = {"seeds": [1], "sampler": sampler, "num_inference_steps": 100}
    x = sample(model, process, start=Start(data, 60), **options)
    level = Sampler(SamplingConfig(sampler, 100), process, 60)
    alpha, sigma = level.noise_level(level.first)
    noise = torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(1))
    assert_close(seen[0], alpha * data + sigma * noise, rtol=0, atol=1e-5)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert x.std().item() == pytest.approx(STD, abs=0.04)
    as_it_is = sample(model, process, start=Start(seen[0], 60, add_noise=False), **options)
    assert_close(as_it_is, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_of_x0_ends_in_every_samplers_result(sampler):
    """The known half is that of the result, and batches get their own rows."""
    process, known = Diffusion(), torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    model, seen = small(in_channels=1, out_channels=1), []

    def edit(x0, t, rows):
        seen.append(t)
        return torch.cat([known[rows, :, :4], x0[:, :, 4:]], dim=2)

    x = sample(model, process, seeds=range(3), sampler=sampler, num_inference_steps=4, edit=edit, batch_size=2)
    assert_close(x[:, :, :4], known[:, :, :4], rtol=0, atol=1e-5)
    assert len(seen) == 2 * len(Sampler(SamplingConfig(sampler, 4), process))
    assert seen[0] == 999


# ---- sample ----------------------------------------------------------------------------------------------------------


def generate(model, seeds, **options):
    return sample(model, Diffusion(), seeds=seeds, num_inference_steps=4, **options)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_a_sample_depends_on_its_seed_alone(sampler):
    model = small(num_classes=5)
    labels = torch.tensor([0, 1, 2, 3, 4])
    together = generate(model, range(5), sampler=sampler, class_labels=labels, guidance_scale=2.0)
    in_pairs = generate(model, range(5), sampler=sampler, class_labels=labels, guidance_scale=2.0, batch_size=2)
    alone = generate(model, [3], sampler=sampler, class_labels=labels[3:4], guidance_scale=2.0)
    assert_close(in_pairs, together, rtol=1e-4, atol=1e-4)
    assert_close(alone, together[3:4], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_sampling_leaves_the_model_and_the_random_state_alone():
    model = small(dropout=0.5).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    state = torch.get_rng_state()
    first, second = generate(model, range(2), sampler="ddpm"), generate(model, range(2), sampler="ddpm")
    assert_close(first, second, rtol=0, atol=0)  # dropout was off
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_sizes_steps_and_dtype():
    model = small().bfloat16()
    steps = []
    x = generate(model, range(2), image_size=(5, 7), on_step=steps.append)
    assert x.shape == (2, 3, 5, 7)
    assert x.dtype == torch.float32
    assert [step.t for step in steps] == [999, 749, 499, 249]
    assert generate(small(dims=1, in_channels=2, out_channels=2), [0], image_size=9).shape == (1, 2, 9)


def test_refuses_a_network_for_another_process():
    with pytest.raises(ValueError, match="a learned variance needs variance_type='learned_range'"):
        generate(small(out_channels=6), [0])
    with pytest.raises(ValueError, match="concat has 0 channels; this network was built for 3, or for self_cond"):
        generate(small(in_channels=6), [0])


def test_conditions_reach_the_network():
    model = small(num_classes=5, vector_dim=3, context_dim=6)
    conditions = {
        "class_labels": torch.tensor([1]),
        "vector": torch.randn(1, 3),
        "context": torch.randn(1, 4, 6),
    }
    base = generate(model, [0], **conditions)
    for name in conditions:
        assert (generate(model, [0], **conditions | {name: None}) - base).abs().max() > 1e-3
    masked = generate(model, [0], **conditions, context_mask=torch.tensor([[True, True, False, False]]))
    assert (masked - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "plms"}, "sampler='plms' is not one of 'ddpm'"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 must be 1 to 1000"),
        ({"image_size": (4, 4, 4)}, "image_size=.* 2 of them"),
        ({"image_size": 0}, "image_size=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seeds": []}, "seeds is empty"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 needs a condition"),
        ({"class_labels": torch.tensor([0])}, "class_labels has 1 rows for 2 seeds"),
        ({"classes": torch.tensor([0])}, "classes is neither a condition .*class_labels.* nor an option .*sampler"),
        ({"start": Start(torch.zeros(1, 3, 8, 8), 1)}, r"start has shape \(1, 3, 8, 8\); there are 2 seeds of size"),
        ({"start": Start(torch.zeros(2, 3, 8, 8), 2)}, "first_step=2 must be 0 to 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sample(small(num_classes=5), Diffusion(), **{"seeds": [0, 1], "num_inference_steps": 2} | options)
