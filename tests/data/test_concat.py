"""A second image as input channels: the functions, the wrapper, the network's call, and runs that are trained so."""

import numpy as np
import pytest
import torch
from PIL import Image

from support.data import TINY, failure, write_folder
from support.networks import small
from unet_denoiser import Diffusion, Guidance, Run, SamplingConfig, load_data, sample, training_losses
from unet_denoiser.cli.app import main
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.wrappers.concat import draw_mask, enlarge, lower_resolution, mask_images
from unet_denoiser.diffusion.process import accepts_concat
from unet_denoiser.utils.images import to_uint8


def test_lower_resolution_keeps_low_frequencies():
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    low = lower_resolution(x, 4)
    assert low.shape == x.shape
    assert low.abs().max() <= 1
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(lower_resolution(flat, 4), flat)
    smooth = torch.linspace(-0.5, 0.5, 16).expand(1, 1, 16, 16)
    assert (lower_resolution(smooth, 2) - smooth).abs().mean() < 0.02
    checkers = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert lower_resolution(checkers.expand(1, 1, 8, 8), 4).abs().max() < 0.2  # antialiased away


def test_enlarge_equals_what_training_sees():
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    small_image = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    torch.testing.assert_close(enlarge(small_image, (8, 8)), lower_resolution(x, 2))


def test_lower_resolution_needs_a_multiple_of_the_factor():
    with pytest.raises(ValueError, match=r"concat='downscaled:3'.*\(8, 8\)"):
        lower_resolution(torch.zeros(1, 1, 8, 8), 3)


def test_mask_images():
    x = torch.rand(1, 2, 2, 2) + 0.1
    out = mask_images(x, torch.tensor([[[[True, False], [False, False]]]]))
    assert out.shape == (1, 3, 2, 2)
    assert out[0, 0].tolist() == [[1, -1], [-1, -1]]
    assert not out[0, 1:, 0, 0].any()
    assert torch.equal(out[0, 1:, 1], x[0, :, 1])


def test_drawn_masks():
    masks = torch.stack([draw_mask((16, 24), np.random.default_rng(i)) for i in range(200)])
    assert masks.shape == (200, 1, 16, 24)
    assert masks.dtype == torch.bool
    shares = masks.float().mean((1, 2, 3))
    assert (shares > 0).all()
    assert shares.min() < 0.2 < 0.7 < shares.max()
    assert 0.2 < shares.mean() < 0.6
    assert torch.equal(masks[7], draw_mask((16, 24), np.random.default_rng(7)))
    assert masks.float().mean(0).min() > 0.05  # each pixel is masked at times


def test_concat_follows_x_in_the_channels():
    model = small(in_channels=3, out_channels=1)
    x, t, concat = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 2, 8, 8)
    assert torch.equal(accepts_concat(model)(x, t, concat=concat), model(torch.cat([x, concat], 1), t))
    drop = {"concat": torch.tensor([True, False])}
    zeroed = torch.cat([x, concat * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)], 1)
    torch.testing.assert_close(accepts_concat(model)(x, t, concat=concat, drop=drop), model(zeroed, t))


def test_concat_is_dropped_apart_from_other_conditions():
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
def test_sampling_refuses_a_wrong_concat(concat, options, message):
    with pytest.raises(ValueError, match=message):
        sample(small(in_channels=3, out_channels=1), Diffusion(), seeds=[0, 1], concat=concat, **options)


def test_loss_with_concat():
    model, process = small(in_channels=3, out_channels=1), Diffusion(prediction_type="epsilon")
    x0, concat = torch.randn(4, 1, 8, 8), torch.randn(4, 2, 8, 8)
    draws = {"t": torch.tensor([1, 10, 100, 900]), "noise": torch.randn(4, 1, 8, 8)}
    seen = training_losses(process, model, x0, concat=concat, **draws).loss
    xt = process.add_noise(x0, draws["noise"], draws["t"])
    error = model(torch.cat([xt, concat], 1), draws["t"]) - draws["noise"]
    torch.testing.assert_close(seen, error.square().flatten(1).mean(1))


def test_inpainting_masks_depend_on_seed_and_position(image_folder):
    data = load_data(str(image_folder), concat="inpainting")
    assert data.concat_channels == 4
    items = [data[StreamIndex(1, position, 5)] for position in range(8)]
    masks = torch.stack([item["concat"][:1] for item in items])
    assert len({mask.numpy().tobytes() for mask in masks}) > 5
    for position, item in enumerate(items):
        assert torch.equal(item["concat"], data[StreamIndex(1, position, 5)]["concat"])
        outside = item["concat"][0] == -1
        assert torch.equal(item["concat"][1:, outside], item["image"][:, outside])
        assert not item["concat"][1:, ~outside].any()


def test_pairs_are_augmented_alike(tmp_path):
    first = write_folder(tmp_path / "a", size=12)
    other = tmp_path / "b"
    other.mkdir()
    for file in first.glob("*.png"):  # the negative, as another format
        Image.fromarray(255 - np.asarray(Image.open(file))).save(other / f"{file.stem}.bmp")
    options = {"image_size": 8, "resize_mode": "random_crop", "horizontal_flip": True}
    data = load_data(str(first), concat=str(other), **options)
    for position in range(20):
        item = data[StreamIndex(position % 6, position, 1)]
        torch.testing.assert_close(item["concat"], -item["image"], rtol=0, atol=0.01)  # a value's rounding


def test_pairs_need_the_same_names(image_folder, tmp_path):
    other = write_folder(tmp_path / "other", count=5)
    with pytest.raises(ValueError, match="has no usable image 5; names must be the same in both folders"):
        load_data(str(image_folder), concat=str(other))


def test_run_for_super_resolution(image_folder, tmp_path, capsys):
    plain, data = load_data(str(image_folder)), load_data(str(image_folder), concat="downscaled:4")
    assert data.concat_channels == 3
    torch.testing.assert_close(data[3]["concat"][None], lower_resolution(plain[3]["image"][None], 4))
    run = tmp_path / "run"
    main(["train", str(image_folder), "--out", str(run), "--concat", "downscaled:4", *TINY])
    config = Run.load(run).model
    assert (config.in_channels, config.out_channels) == (6, 3)
    assert len(list((run / "samples").glob("*.png"))) == 1
    write_folder(tmp_path / "small", count=1, size=3)
    sampling = ["sample", str(run), "--num-images", "1", "--num-inference-steps", "1", "--separate"]
    main([*sampling, "--concat-image", str(tmp_path / "small" / "0.png")])
    assert Image.open(run / "samples-separate" / "000000.png").size == (12, 12)
    assert "concat has 0 channels; this network was built for 3, or for self_conditioning=True" in failure(
        sampling, capsys
    )
    main([*sampling, "--image", str(tmp_path / "small" / "0.png"), "--upscale", "4"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (12, 12)
    wrong = [*sampling, "--image", tmp_path / "small" / "0.png", "--upscale", "2"]
    assert "upscale=2" in failure(wrong, capsys)
    assert "x.png cannot be read as an image" in failure([*sampling, "--concat-image", "x.png"], capsys)


def test_run_for_inpainting(image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(image_folder), "--out", str(run), "--concat", "inpainting", *TINY])
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:3] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    sampling = ["sample", str(run), "--num-images", "2", "--num-inference-steps", "1", "--separate"]
    main([*sampling, "--image", str(image_folder / "2.png"), "--mask", str(tmp_path / "mask.png")])
    found = np.asarray(Image.open(run / "samples-separate" / "000001.png"))
    picture = to_uint8(load_data(str(image_folder))[2]["image"]).permute(1, 2, 0).numpy()
    assert np.array_equal(found[3:], picture[3:])
    assert not np.array_equal(found[:3], picture[:3])
    main([*sampling, "--image", str(image_folder / "2.png"), "--outpaint", "0", "2", "0", "1"])
    assert Image.open(run / "samples-separate" / "000001.png").size == (11, 8)
    assert "give image, and mask or outpaint" in failure([*sampling, "--concat-image", image_folder / "2.png"], capsys)
    assert "needs an image" in failure([*sampling, "--mask", tmp_path / "mask.png"], capsys)
