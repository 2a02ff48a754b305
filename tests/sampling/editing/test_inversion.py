"""Inversion against the affine map of a Gaussian, and by making the images again."""

import pytest
import torch
from torch.testing import assert_close

from support.networks import small
from support.oracles import Gaussian, as_network
from unet_denoiser import Diffusion, invert, regenerate

MEAN, STD = 0.3, 0.5


def gaussian(process):
    network = Gaussian(process, torch.full((192,), MEAN), STD**2 * torch.eye(192), (3, 8, 8))
    return as_network(small(), network)


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_inverted_noise_of_a_gaussian(prediction):
    """The flow takes noise z to MEAN + STD z, but for ddim's steps; inverting undoes these too."""
    process = Diffusion(prediction_type=prediction, clip_sample_range=None)
    model, x, options = gaussian(process), images(), {"num_inference_steps": 50}
    inversion = invert(model, process, x, iterations=100, **options)
    assert_close(inversion.noise, (x - MEAN) / STD, rtol=0.08, atol=0.08)
    assert_close(regenerate(model, process, inversion, **options), x, rtol=0, atol=2e-3)
    assert inversion.gap.max() <= 1e-4


def test_fixed_point_iterations_make_inversion_exact():
    """Plain inversion is off by a hundredth here; the remainder of the last step is not the reason."""
    process = Diffusion()
    model = small(num_classes=5)
    model.output[2].weight.data.mul_(0.2)
    x, options = images(), {"class_labels": torch.tensor([0, 1, 2]), "num_inference_steps": 10}
    errors = {}
    for iterations in (0, 50):
        inversion = invert(model, process, x, iterations=iterations, **options)
        errors[iterations] = (regenerate(model, process, inversion, **options) - x).abs().max().item()
    assert errors[50] < 2e-3
    assert errors[0] > 10 * errors[50]
    plain = x - inversion.remainder
    assert_close(regenerate(model, process, inversion._replace(remainder=x * 0), **options), plain, rtol=0, atol=2e-3)
    others = regenerate(model, process, inversion, **options | {"class_labels": torch.tensor([3, 4, 4])})
    assert (others - x).abs().max() > 0.01


def test_inversion_does_not_depend_on_the_batch():
    process, model, x = Diffusion(), small(), images(4)
    model.output[2].weight.data.mul_(0.2)
    together = invert(model, process, x, num_inference_steps=5)
    apart = invert(model, process, x, num_inference_steps=5, batch_size=3)
    alone = invert(model, process, x[1:2], num_inference_steps=5)
    for found, whole, one in zip(apart, together, alone, strict=True):
        assert_close(found, whole, rtol=1e-3, atol=1e-3)
        assert_close(one, whole[1:2], rtol=1e-3, atol=1e-3)


def test_inversion_to_pure_noise():
    process = Diffusion(rescale_betas_zero_snr=True)
    model, x, options = small(), images(2), {"num_inference_steps": 8}
    model.output[2].weight.data.mul_(0.2)
    inversion = invert(model, process, x, iterations=50, **options)
    assert_close(regenerate(model, process, inversion, **options), x, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dpm++"}, r"sampler='dpm\+\+' cannot be inverted; give 'ddim'"),
        ({"eta": 0.5}, "eta=0.5 cannot be inverted"),
        ({"iterations": -1}, "iterations=-1 must be at least 0"),
        ({"tolerance": 0}, "tolerance=0 above 0"),
        ({"class_labels": torch.zeros(2)}, "class_labels has 2 samples for 3 seeds"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        invert(small(), Diffusion(), images(), **options)


def test_self_conditioning_is_refused():
    process = Diffusion(self_conditioning=True)
    with pytest.raises(ValueError, match="self_conditioning=True cannot be inverted"):
        invert(small(**process.channels(3)), process, images())
