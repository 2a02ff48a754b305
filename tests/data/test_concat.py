"""Pictures beside the noisy one, and the network's call with them."""

import numpy as np
import pytest
import torch

from support.networks import small
from unet_denoiser import Diffusion, Guidance, SamplingConfig, sample, training_losses
from unet_denoiser.data.wrappers.concat import downscaled, enlarged, masked, random_mask
from unet_denoiser.diffusion.process import accepts_concat


def test_downscaled_keeps_what_a_small_picture_can_hold():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    low = downscaled(x, 4)
    assert low.shape == x.shape
    assert low.abs().max() <= 1
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(downscaled(flat, 4), flat)
    smooth = torch.linspace(-0.5, 0.5, 16).expand(1, 1, 16, 16)
    assert (downscaled(smooth, 2) - smooth).abs().mean() < 0.02
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert downscaled(checkers.expand(1, 1, 8, 8), 4).abs().max() < 0.2  # antialiased away


def test_a_small_picture_enlarged_is_what_training_saw():
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    small_picture = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    torch.testing.assert_close(enlarged(small_picture, (8, 8)), downscaled(x, 2))


def test_downscaled_wants_a_multiple():
    with pytest.raises(ValueError, match=r"concat='downscaled:3'.*\(8, 8\)"):
        downscaled(torch.zeros(1, 1, 8, 8), 3)


def test_masked():
    x = torch.rand(1, 2, 2, 2) + 0.1
    out = masked(x, torch.tensor([[[[True, False], [False, False]]]]))
    assert out.shape == (1, 3, 2, 2)
    assert out[0, 0].tolist() == [[1, -1], [-1, -1]]
    assert not out[0, 1:, 0, 0].any()
    assert torch.equal(out[0, 1:, 1], x[0, :, 1])


def test_random_masks():
    masks = torch.stack([random_mask((16, 24), np.random.default_rng(i)) for i in range(200)])
    assert masks.shape == (200, 1, 16, 24)
    assert masks.dtype == torch.bool
    shares = masks.float().mean((1, 2, 3))
    assert (shares > 0).all()
    assert shares.min() < 0.2 < 0.7 < shares.max()
    assert 0.2 < shares.mean() < 0.6
    assert torch.equal(masks[7], random_mask((16, 24), np.random.default_rng(7)))
    # everywhere is masked now and then
    assert masks.float().mean(0).min() > 0.05


def test_the_channels_come_after_x():
    model = small(in_channels=3, out_channels=1)
    x, t, concat = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 2, 8, 8)
    assert torch.equal(accepts_concat(model)(x, t, concat=concat), model(torch.cat([x, concat], 1), t))
    drop = {"concat": torch.tensor([True, False])}
    zeroed = torch.cat([x, concat * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)], 1)
    torch.testing.assert_close(accepts_concat(model)(x, t, concat=concat, drop=drop), model(zeroed, t))


def test_other_conditions_are_dropped_beside_it():
    model = small(in_channels=2, out_channels=1, num_classes=4)
    x, t, concat = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 1, 8, 8)
    labels, mask = torch.tensor([0, 3]), torch.tensor([True, False])
    got = accepts_concat(model)(x, t, concat=concat, class_labels=labels, drop={"class_labels": mask, "concat": ~mask})
    whole = torch.cat([x, concat * mask.float().view(2, 1, 1, 1)], 1)
    torch.testing.assert_close(got, model(whole, t, class_labels=labels, drop={"class_labels": mask}))


def test_guidance_by_one_condition_keeps_the_other():
    model = small(in_channels=2, out_channels=1, num_classes=4)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    given = {"concat": torch.randn(2, 1, 8, 8), "class_labels": torch.tensor([0, 3])}
    call, everyone = accepts_concat(model), torch.ones(2, dtype=torch.bool)
    with torch.no_grad():
        for guided in (["class_labels"], ["concat"], ["class_labels", "concat"], None):
            names = guided or list(given)
            free = call(x, t, **given, drop=dict.fromkeys(names, everyone))
            expected = free + 3 * (call(x, t, **given) - free)
            got = Guidance(call, SamplingConfig(guidance_scale=3.0), given, guided=guided)(x, t)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guided='vector' is not one of the conditions given: class_labels, concat"):
        Guidance(call, SamplingConfig(), given, guided=["vector"])


def test_sampling_takes_its_size_from_concat():
    model, process = small(in_channels=3, out_channels=1), Diffusion()
    options = {"seeds": range(3), "num_inference_steps": 2}
    concat = torch.randn(3, 2, 8, 12)
    x = sample(model, process, concat=concat, **options)
    assert x.shape == (3, 1, 8, 12)
    alone = sample(model, process, seeds=[1], num_inference_steps=2, concat=concat[1:2])
    torch.testing.assert_close(x[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(x, sample(model, process, concat=-concat, **options))
    guided = sample(model, process, concat=concat, guidance_scale=2.0, **options)
    assert guided.shape == x.shape


@pytest.mark.parametrize(
    ("concat", "options", "message"),
    [
        (None, {}, "concat has 0 channels; this network was built for 2"),
        (torch.zeros(2, 1, 8, 8), {}, "concat has 1 channels; this network was built for 2"),
        (torch.zeros(2, 2, 8, 8), {"image_size": 16}, r"concat has size \(8, 8\); the samples have \(16, 16\)"),
        (torch.zeros(3, 2, 8, 8), {}, "concat has 3 samples for 2 seeds"),
    ],
)
def test_sampling_with_the_wrong_concat(concat, options, message):
    with pytest.raises(ValueError, match=message):
        sample(small(in_channels=3, out_channels=1), Diffusion(), seeds=[0, 1], concat=concat, **options)


def test_the_loss_sees_it():
    model, process = small(in_channels=3, out_channels=1), Diffusion(prediction_type="epsilon")
    x0, concat = torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)
    draws = {"t": torch.tensor([1, 10, 100, 900]), "noise": torch.randn(4, 1, 8, 8)}
    seen = training_losses(process, model, x0, concat=concat, **draws).loss
    xt = process.add_noise(x0, draws["noise"], draws["t"])
    error = model(torch.cat([xt, concat], 1), draws["t"]) - draws["noise"]
    torch.testing.assert_close(seen, error.square().flatten(1).mean(1))
