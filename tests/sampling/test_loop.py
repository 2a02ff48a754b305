"""The loop of the reverse process and `sample`: clipping, starting, editing, seeds and refusals."""

import diffusers
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from support.networks import small
from support.oracles import Mixture
from unet_denoiser import Diffusion, Sampler, SamplingConfig, Start, denoise, sample
from unet_denoiser.sampling.loop import apply_dynamic_threshold
from unet_denoiser.sampling.samplers import SAMPLERS

FEW = ("ddpm", "dpm++", "heun", "pndm")  # one of each kind of network calls, and of drawing noise
MEAN, STD = 0.3, 0.5


def gaussian_oracle(process):
    return Mixture(process, [MEAN], [STD])


def run(predict, process, noise, **options):
    *_, last = denoise(predict, process, noise, **options)
    return last.x


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_variance_type_of_ddpm_equals_diffusers(variance, prediction):
    """Also with fewer steps than trained, where the limits of a learned variance are those of the longer steps."""
    options = {"prediction_type": prediction, "variance_type": variance, "beta_schedule": "linear"}
    process = Diffusion(**options)
    model, z = small(in_channels=1, **{"out_channels": process.channels(1)["out_channels"]}), torch.randn(2, 1, 8, 8)
    model.output[2].weight.data.mul_(0.1)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sampling = {"sampler": "ddpm", "num_inference_steps": 8, "clip_sample": False, "generators": generators}
    steps = [step.x for step in denoise(model, process, z, **sampling)]
    peer = diffusers.DDPMScheduler(**options, timestep_spacing="trailing", clip_sample=False)
    peer.set_timesteps(8)
    expected, draws = z, [torch.Generator().manual_seed(i) for i in range(2)]
    for t, x in zip(peer.timesteps, steps, strict=True):
        with torch.no_grad():
            output = model(expected, t.expand(2))
        step = peer.step(output, t, expected, generator=draws)
        expected = step.prev_sample if t != peer.timesteps[-1] else step.pred_original_sample
        assert_close(x, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("sampler", [name for name, kind in SAMPLERS.items() if not kind.stochastic])
def test_other_samplers_ignore_the_learned_variance(sampler):
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


@pytest.mark.parametrize("sampler", FEW)
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
    assert unclipped.abs().max() > 2 or sampler == "kdpm2"  # whose middles happen to damp this network
    for step in denoise(wrong, process, z, sampler=sampler, num_inference_steps=10):
        assert step.x0.abs().max() <= 1


@pytest.mark.parametrize("percentile", [0.5, 0.75, 1.0])
def test_dynamic_threshold_equals_diffusers(percentile):
    """diffusers interpolates between two values, so the percentiles here are those of one value."""
    x0 = torch.randn(4, 3, 7, 9) * torch.tensor([0.1, 1.0, 2.0, 5.0]).view(4, 1, 1, 1)
    peer = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=percentile, sample_max_value=1e9)
    ours = apply_dynamic_threshold(x0, percentile, (-1, 1))
    assert_close(ours, peer._threshold_sample(x0), rtol=0, atol=1e-6)
    assert torch.equal(ours[0], x0[0])
    assert ours.abs().max() <= 1 + 1e-6
    process, x = Diffusion(prediction_type="sample", clip_sample_range=2.0), torch.randn(3, 1, 8, 8)
    *_, last = denoise(lambda x, t: 5 * x, process, x, dynamic_threshold=percentile, num_inference_steps=1)
    assert_close(last.x, 2 * apply_dynamic_threshold(5 * x / 2, percentile, (-1, 1)), rtol=1e-5, atol=1e-5)


# ---- starting later, and editing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "kdpm2"])
def test_starting_at_a_later_step_continues_the_trajectory(sampler):
    """For samplers without memory of earlier steps, continuing from x_t equals an uninterrupted run."""
    process = Diffusion(clip_sample_range=None)
    options, first = {"sampler": sampler, "num_inference_steps": 6}, 3
    steps = list(denoise(gaussian_oracle(process), process, torch.randn(5, 1), **options))
    x = steps[2 * first - 1 if len(steps) > 6 else first - 1].x
    assert_close(run(gaussian_oracle(process), process, x, first_step=first, **options), steps[-1].x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", FEW)
def test_start_noises_data_to_the_level_of_its_step(sampler):
    """Data that are noised to a level and sampled from there have the same distribution."""
    process = Diffusion(clip_sample_range=None, beta_schedule="linear")
    model, seen = small(in_channels=1, out_channels=1, dims=1, image_size=4000, attention_resolutions=()), []
    oracle = gaussian_oracle(process)
    model.forward = lambda x, t: seen.append(x) or oracle(x.flatten(1).T, t.expand(4000)).T.view_as(x)
    data = MEAN + STD * torch.randn(1, 1, 4000)
    options = {"seeds": [1], "sampler": sampler, "num_inference_steps": 100}
    x = sample(model, process, start=Start(data, 60), **options)
    level = Sampler(SamplingConfig(sampler, 100), process, 60)
    alpha, sigma = level.alpha_sigma(0)
    noise = torch.randn(1, 1, 4000, generator=torch.Generator().manual_seed(1))
    assert_close(seen[0], alpha * data + sigma * noise, rtol=0, atol=1e-5)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert x.std().item() == pytest.approx(STD, abs=0.04)
    as_it_is = sample(model, process, start=Start(seen[0], 60, add_noise=False), **options)
    assert_close(as_it_is, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_of_x0_ends_in_every_samplers_result(sampler):
    """The known half comes back in the result, and each batch gets the indices of its samples."""
    process, known = Diffusion(), torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    model, seen = small(in_channels=1, out_channels=1), []

    def edit(x0, t, indices):
        seen.append(t)
        return torch.cat([known[indices, :, :4], x0[:, :, 4:]], dim=2)

    x = sample(model, process, seeds=range(3), sampler=sampler, num_inference_steps=4, edit=edit, batch_size=2)
    assert_close(x[:, :, :4], known[:, :, :4], rtol=0, atol=1e-5)
    assert seen == 2 * Sampler(SamplingConfig(sampler, 4), process).timesteps.tolist()


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


LABELS = torch.tensor([2, 2])


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"seeds": 5}, {"seeds": [5]}),
        ({"seeds": np.int64(5)}, {"seeds": [5]}),
        ({"seeds": torch.tensor([3, 5])}, {"seeds": [3, 5]}),
        ({"seeds": np.array([3, 5])}, {"seeds": [3, 5]}),
        ({"seeds": (seed for seed in (3, 5))}, {"seeds": [3, 5]}),
        ({"class_labels": [1, 2]}, {"class_labels": torch.tensor([1, 2])}),
        ({"class_labels": np.array([1, 2])}, {"class_labels": torch.tensor([1, 2])}),
        ({"class_labels": 2}, {"class_labels": torch.tensor([2, 2])}),
        ({"class_labels": np.int32(2)}, {"class_labels": torch.tensor([2, 2])}),
        ({"vector": [[1, 2, 3], [4, 5, 6]]}, {"vector": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}),
        ({"vector": np.ones((2, 3))}, {"vector": torch.ones(2, 3)}),
        ({"config": {"num_inference_steps": 3}}, {"num_inference_steps": 3}),
        ({"num_inference_steps": 3.0}, {"num_inference_steps": 3}),
        ({"image_size": [8, np.int64(8)]}, {"image_size": 8}),
        (
            {"negative": {"class_labels": 1}, "class_labels": 2, "guidance_scale": 2},
            {
                "negative": {"class_labels": torch.tensor([1])},
                "class_labels": torch.tensor([2, 2]),
                "guidance_scale": 2.0,
            },
        ),
    ],
)
def test_plain_meanings_are_taken(options, plain):
    model, common = small(num_classes=5, vector_dim=3), {"seeds": [0, 1], "num_inference_steps": 2}
    if "config" in options:
        del common["num_inference_steps"]
    assert torch.equal(sample(model, Diffusion(), **common | options), sample(model, Diffusion(), **common | plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1.5]}, "seeds has 1.5; give ints"),
        ({"seeds": np.array([1.5])}, "seeds has 1.5; give ints"),
        ({"seeds": "12"}, "seeds='12' must be ints"),
        ({"seeds": ["1"]}, "seeds has '1'; give ints"),
        ({"seeds": [True]}, "seeds has True; give ints"),
        ({"seeds": None}, "seeds=None must be ints"),
        ({"seeds": 2.0}, "seeds=2.0 must be ints"),
        ({"seeds": [2**64]}, "seeds has 18446744073709551616, which does not fit 64 bits"),
        ({"class_labels": ["cat", "dog"]}, r"class_labels=\['cat', 'dog'\] must be a tensor, or numbers; a Pipeline"),
        ({"class_labels": "cat"}, "class_labels='cat' must be a tensor, or numbers; a Pipeline turns names"),
        ({"class_labels": [0.5, 1.0]}, "class_labels has dtype torch.float32; give int64"),
        ({"class_labels": [9, 1]}, "class_labels has 9; valid are 0 to 4"),
        ({"vector": {"a": 1}}, "vector={'a': 1} must be a tensor, or numbers"),
        ({"vector": 3}, "vector=3 must have one sample per seed"),
        ({"guidance_scale": "2"}, "guidance_scale='2' must be a number"),
        ({"compile": "false"}, "compile='false' must be True or False"),
        ({"config": 3}, "config is a int; give a SamplingConfig"),
        ({"batch_size": "4"}, "batch_size='4' must be an int of at least 1"),
        ({"image_size": "8"}, "image_size=8 must be a positive int, or 2 of them"),
    ],
)
def test_other_types_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample(small(num_classes=5, vector_dim=3), Diffusion(), **{"seeds": [0, 1], "num_inference_steps": 2} | options)


def test_a_process_as_a_dict_is_refused():
    with pytest.raises(TypeError, match=r"process is a dict; give a Diffusion, such as Diffusion\(\*\*options\)"):
        sample(small(), {"prediction_type": "epsilon"}, seeds=[0])


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
        ({"dynamic_threshold": 0.0}, "dynamic_threshold=0.0 must be above 0 to 1"),
        (
            {"dynamic_threshold": 0.9, "clip_sample": False},
            "dynamic_threshold=0.9 clips x0, but clip_sample=False",
        ),
        ({"guidance_rescale": 1.5}, "guidance_rescale=1.5 must be 0"),
        ({"guidance_rescale": 0.5, "guidance_scale": 0.0}, "guidance_scale=0 computes no conditional output"),
        ({"guidance_interval": (3, 1)}, r"guidance_interval=\(3, 1\) must be two numbers"),
        ({"negative": {"class_labels": torch.tensor([0] * 3)}}, "negative class_labels has 3 samples for 2 seeds"),
        ({"class_labels": torch.tensor([0])}, "class_labels has 1 samples for 2 seeds"),
        ({"classes": torch.tensor([0])}, "classes is neither a condition .*class_labels.* nor an option .*sampler"),
        ({"start": Start(torch.zeros(1, 3, 8, 8), 1)}, r"start has shape \(1, 3, 8, 8\); there are 2 seeds of size"),
        ({"start": Start(torch.zeros(2, 3, 8, 8), 2)}, "first_step=2 must be 0 to 1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        sample(small(num_classes=5), Diffusion(), **{"seeds": [0, 1], "num_inference_steps": 2} | options)


def test_dynamic_threshold_needs_a_range():
    with pytest.raises(ValueError, match=r"dynamic_threshold=0\.9 needs data of a known range"):
        sample(small(), Diffusion(clip_sample_range=None), seeds=[0], dynamic_threshold=0.9)
