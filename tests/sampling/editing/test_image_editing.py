"""Images edited with a trained network, against the closed forms of Gaussian data."""

import pytest
import torch
from torch.testing import assert_close

from support.networks import small
from support.oracles import Gaussian, as_network
from unet_denoiser import Diffusion, image_to_image, inpaint, outpaint, sample, upscale
from unet_denoiser.data.wrappers.concat import enlarge, mask_images
from unet_denoiser.sampling.editing.image_editing import pad_canvas

SEEDS = range(4)
FEW = {"num_inference_steps": 5}


def images(count=4, size=(8, 8), seed=7):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def left_half(size=(8, 8)):
    mask = torch.zeros(1, 1, *size, dtype=torch.bool)
    mask[..., : size[1] // 2] = True
    return mask


# ---- image to image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"])
def test_full_strength_is_sampling_and_little_returns_the_image(sampler):
    process = Diffusion()
    model, x = small(), images()
    options = {"seeds": SEEDS, "sampler": sampler, **FEW}
    assert torch.equal(image_to_image(model, process, x, strength=1, **options), sample(model, process, **options))
    # a perfect network for these very images: it removes exactly the added noise
    near = Gaussian(process, x[0].flatten() * 0, torch.eye(192), (3, 8, 8))
    options["num_inference_steps"] = 100
    little = image_to_image(as_network(small(), near), process, x, strength=0.01, clip_sample=False, **options)
    assert (little - x).abs().max() < 0.15


def test_strength_sets_the_share_of_noise():
    """From alpha x + sigma z at the first step, the flow of a Gaussian of unit variance turns by the angle of alpha."""
    process = Diffusion(clip_sample_range=None)
    model = as_network(small(), Gaussian(process, torch.zeros(192), torch.eye(192), (3, 8, 8)))
    x = images(1)
    for strength in (0.2, 0.5, 0.8):
        options = {"seeds": SEEDS, "num_inference_steps": 200, "sampler": "ddim"}
        out = image_to_image(model, process, x, strength=strength, **options)
        t = round(1000 * strength) - 1
        noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in SEEDS])
        assert_close(out, process.alphas[t] * x + process.sigmas[t] * noise, rtol=0, atol=0.03)


def test_image_to_image_depends_on_the_seed_alone():
    model, x = small(num_classes=5), images()
    labels = torch.tensor([0, 1, 2, 3])
    options = {"sampler": "ddpm", "guidance_scale": 2.0, **FEW}
    together = image_to_image(model, Diffusion(), x, seeds=SEEDS, class_labels=labels, **options)
    pairs = image_to_image(model, Diffusion(), x, seeds=SEEDS, class_labels=labels, batch_size=3, **options)
    alone = image_to_image(model, Diffusion(), x[2:3], seeds=[2], class_labels=labels[2:3], **options)
    assert_close(pairs, together, rtol=1e-4, atol=1e-4)
    assert_close(alone, together[2:3], rtol=1e-4, atol=1e-4)


# ---- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc", "euler", "heun"])
def test_known_pixels_come_back_exactly(sampler):
    model, x, mask = small(), images(1, (8, 12)), left_half((8, 12))
    out = inpaint(model, Diffusion(), x, mask, seeds=SEEDS, sampler=sampler, **FEW)
    assert out.shape == (4, 3, 8, 12)
    assert torch.equal(out[..., 6:], x[..., 6:].expand(4, -1, -1, -1))
    assert (out[0, ..., :6] - out[1, ..., :6]).abs().max() > 0.01
    again = inpaint(model, Diffusion(), x, mask, seeds=[2], sampler=sampler, **FEW)
    assert_close(again, out[2:3], rtol=1e-3, atol=1e-3)


def conditional(process, resample, steps=30, count=600):
    """Mean and std of the unknown one of two values with correlation 0.8, the other one being 1."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    options = {"in_channels": 1, "out_channels": 1, "dims": 1, "image_size": 2, "attention_resolutions": ()}
    network = as_network(small(**options), Gaussian(process, torch.zeros(2), covariance, (1, 2)))
    x, mask = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[True, False]]])
    out = inpaint(
        network,
        process,
        x,
        mask,
        seeds=range(count),
        resample=resample,
        sampler="ddpm",
        num_inference_steps=steps,
        batch_size=count,
    )
    return out[:, 0, 0].mean().item(), out[:, 0, 0].std().item()


def test_resampling_leads_to_the_conditional_distribution():
    """N(0.8, 0.6^2) for a perfect network. Without resampling the unknown value follows the known one too little."""
    process = Diffusion(clip_sample_range=None)
    mean, std = conditional(process, 4)
    assert abs(mean - 0.8) < 0.12
    assert abs(std - 0.6) < 0.1
    assert conditional(process, 1)[0] < 0.6


def test_resampling_draws_from_the_seed_alone():
    model, x, mask = small(), images(), left_half()
    options = {"resample": 3, "sampler": "ddim", **FEW}
    together = inpaint(model, Diffusion(), x, mask, seeds=SEEDS, **options)
    assert torch.equal(together[..., 4:], x[..., 4:])
    alone = inpaint(model, Diffusion(), x[1:2], mask, seeds=[1], **options)
    assert_close(alone, together[1:2], rtol=1e-4, atol=1e-4)
    assert (together - inpaint(model, Diffusion(), x, mask, seeds=SEEDS, sampler="ddim", **FEW)).abs().max() > 0.01
    calls = []
    inpaint(model, Diffusion(), x, mask, seeds=SEEDS, on_step=calls.append, **options)
    assert len(calls) == 15


def test_a_network_for_inpainting_sees_mask_and_image():
    model, x, mask = small(in_channels=7), images(), left_half()
    out = inpaint(model, Diffusion(), x, mask, seeds=SEEDS, **FEW)
    concat = mask_images(x, mask.expand(4, -1, -1, -1))

    def edit(x0, t, indices):
        return torch.where(mask, x0, x[indices])

    expected = sample(model, Diffusion(), seeds=SEEDS, concat=concat, edit=edit, **FEW)
    assert_close(out, torch.where(mask, expected, x), rtol=0, atol=0)


def test_outpainting_keeps_the_image():
    model, x = small(), images(1)
    out = outpaint(model, Diffusion(), x, (1, 2, 3, 4), seeds=SEEDS, **FEW)
    assert out.shape == (4, 3, 12, 14)
    assert torch.equal(out[..., 1:9, 4:12], x.expand(4, -1, -1, -1))
    enlarged_canvas, mask = pad_canvas(x, (1, 2, 3, 4))
    assert mask.sum() == 12 * 14 - 64
    assert not mask[..., 1:9, 4:12].any()
    assert torch.equal(enlarged_canvas[0, :, 0, 4], x[0, :, 0, 0])


# ---- super-resolution ------------------------------------------------------------------------------------------------


def test_upscaling_keeps_the_averages_and_follows_the_data():
    """A perfect network for rows that are constant along the width knows the details from the averages."""
    process = Diffusion(clip_sample_range=None)
    rows = torch.kron(torch.eye(4), torch.ones(4, 4)) + 1e-4 * torch.eye(16)
    network = as_network(
        small(in_channels=1, out_channels=1, image_size=4), Gaussian(process, torch.zeros(16), rows, (1, 4, 4))
    )
    low = torch.tensor([[[[0.5, 0.5], [-0.3, -0.3]]]])
    out = upscale(network, process, low, 2, seeds=range(200), num_inference_steps=30, resample=4, sampler="ddpm")
    assert_close(torch.nn.functional.avg_pool2d(out, 2), low.expand(200, -1, -1, -1), rtol=0, atol=1e-5)
    assert out.std(-1).max() < 0.1  # rows are constant
    # the two rows behind one average a differ by noise of unit variance each: N(a, 1/2)
    assert abs(out[:, 0, 0, 0].mean() - 0.5) < 0.15
    assert abs(out[:, 0, 0, 0].std() - 0.5**0.5) < 0.1


def test_a_network_for_super_resolution_sees_the_enlarged_image():
    model, x = small(in_channels=6), images(1, (4, 6))
    out = upscale(model, Diffusion(), x, 2, seeds=SEEDS, **FEW)
    concat = enlarge(x, (8, 12)).expand(4, -1, -1, -1)
    assert torch.equal(out, sample(model, Diffusion(), seeds=SEEDS, concat=concat, **FEW))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: image_to_image(m, p, images(), seeds=SEEDS, strength=0), "strength=0 must be above 0"),
        (lambda m, p: image_to_image(m, p, images(3), seeds=SEEDS), "images has 3 samples for 4 seeds"),
        (lambda m, p: inpaint(m, p, images(), left_half((4, 4)), seeds=SEEDS), "mask has shape"),
        (
            lambda m, p: inpaint(m, p, images(), left_half(), seeds=SEEDS, resample=2, sampler="dpm++"),
            r"resample=2 with sampler='dpm\+\+'",
        ),
        (lambda m, p: inpaint(m, p, images(), left_half(), seeds=SEEDS, resample=0), "resample=0"),
        (lambda m, p: outpaint(m, p, images(), (1, 2, -3, 0), seeds=SEEDS), "margins="),
        (lambda m, p: upscale(m, p, images(), 1, seeds=SEEDS), "factor=1"),
    ],
)
def test_refuses(call, message):
    def untouched(*args, **others):
        raise AssertionError("the network ran")

    with pytest.raises(ValueError, match=message):
        call(as_network(small(), untouched), Diffusion())


def test_resampling_is_refused_with_self_conditioning():
    process = Diffusion(self_conditioning=True)
    with pytest.raises(ValueError, match="self_conditioning=True"):
        inpaint(small(**process.channels(3)), process, images(), left_half(), seeds=SEEDS, resample=2)
