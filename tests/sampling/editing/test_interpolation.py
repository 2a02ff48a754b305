"""Interpolation: the ends are the samples themselves, and noises lie on the sphere."""

import math

import pytest
import torch
from torch.testing import assert_close

from support.networks import small
from unet_denoiser import Diffusion, interpolate, sample
from unet_denoiser.sampling.editing.interpolation import interpolate_condition, slerp

FEW = {"num_inference_steps": 4}


def test_slerp_is_the_great_circle():
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    for weight in (0.0, 0.25, 0.5, 1.0):
        angle = weight * math.pi / 2
        assert_close(slerp(a, b, weight), torch.tensor([math.cos(angle), 2 * math.sin(angle), 0.0]))
    noise = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    assert slerp(*noise, 0.5).std() == pytest.approx(1, abs=0.03)
    assert torch.lerp(*noise, 0.5).std() < 0.8
    assert torch.equal(slerp(a, a, 0.3), a)
    assert torch.equal(slerp(*noise, 0.0), noise[0])
    assert torch.equal(slerp(*noise, 1.0), noise[1])


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "ddpm"])
def test_the_ends_are_the_two_samples(sampler):
    model, options = small(num_classes=5), {"sampler": sampler, "guidance_scale": 2.0, **FEW}
    x = interpolate(model, Diffusion(), seeds=(3, 8), count=5, class_labels=torch.tensor([1, 4]), **options)
    first = sample(model, Diffusion(), seeds=[3], class_labels=torch.tensor([1]), **options)
    assert_close(x[:1], first, rtol=1e-4, atol=1e-4)
    last = sample(model, Diffusion(), seeds=[8], class_labels=torch.tensor([4]), **options)
    assert_close(x[-1:], last, rtol=1e-4, atol=1e-4)
    middle = interpolate(model, Diffusion(), seeds=(3, 8), count=3, class_labels=torch.tensor([1, 4]), **options)
    assert_close(middle[1], x[2], rtol=1e-4, atol=1e-4)
    assert x.shape == (5, 3, 8, 8)


def test_a_single_seed_or_condition_is_repeated():
    model = small(num_classes=5, vector_dim=3)
    vector = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    options = {"class_labels": torch.tensor([2]), "vector": vector, "image_size": (6, 8), **FEW}
    x = interpolate(model, Diffusion(), seeds=(3, 3), count=3, **options)
    options |= {"class_labels": torch.tensor([2]), "vector": torch.tensor([[1.0, 0.0, 1.0]])}
    assert_close(x[1:2], sample(model, Diffusion(), seeds=[3], **options), rtol=1e-4, atol=1e-4)
    assert (x[0] - x[2]).abs().max() > 0.01


def test_interpolation_with_a_negative_class():
    model, options = small(num_classes=5), {"guidance_scale": 2.0, "negative": {"class_labels": torch.tensor([0])}}
    x = interpolate(model, Diffusion(), seeds=(3, 8), class_labels=torch.tensor([1, 4]), count=3, **options, **FEW)
    last = sample(model, Diffusion(), seeds=[8], class_labels=torch.tensor([4]), **options, **FEW)
    assert_close(x[-1:], last, rtol=1e-4, atol=1e-4)


def test_interpolated_conditions():
    weights = torch.tensor([0.0, 0.25, 1.0])
    classes = interpolate_condition("class_labels", torch.tensor([3, 1]), weights, 4)
    assert classes.tolist() == [[0, 0, 0, 1], [0, 0.25, 0, 0.75], [0, 1, 0, 0]]
    mask = interpolate_condition("context_mask", torch.tensor([[True, False, False], [False, True, False]]), weights)
    assert mask.tolist() == [[True, False, False], [True, True, False], [False, True, False]]
    tokens = torch.randn(2, 3, 6)
    assert_close(interpolate_condition("context", tokens, weights)[1], 0.75 * tokens[0] + 0.25 * tokens[1])
    with pytest.raises(ValueError, match="vector has 3 samples; give two, from and to"):
        interpolate_condition("vector", torch.zeros(3, 2), weights)


@pytest.mark.parametrize("options", [{"seeds": (1, 2), "count": 1}, {"seeds": (1, 2, 3)}])
def test_refuses(options):
    with pytest.raises(ValueError, match="must be at least 2"):
        interpolate(small(), Diffusion(), **options)
