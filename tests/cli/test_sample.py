"""The sample command: editing of images, interpolation, guidance, and one line for every mistake."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.networks import randomise
from unet_denoiser import Run, UNet, image_to_image, interpolate, sample
from unet_denoiser.cli.app import main
from unet_denoiser.data.sources.arrays import digits

TINY = "--model.model-channels 8 --model.num-res-blocks 1 --batch-size 4 --steps 1 --device cpu".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling") / "run"
    main(["train", "digits", "--out", str(path), *TINY])
    return path


@pytest.fixture(scope="module", params=["vp", "flow", "edm"])
def run_of_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("sampling") / request.param
    main(["train", "digits", "--out", str(path), *TINY, "--process.path", request.param])
    return path


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.round((digits()[0][0].reshape(8, 8) + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels).save("digit.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask * 0).save("black.png")
    return pixels


def samples(run, options):
    """Run the command; return the images that it writes, in [-1, 1]."""
    main(["sample", str(run), "--out", "a.png", "--separate", "--num-inference-steps", "4", *shlex.split(options)])
    files = sorted(Path("a-separate").iterdir())
    arrays = [np.asarray(Image.open(file), np.float32) for file in files]
    for file in files:
        file.unlink()
    return torch.from_numpy(np.stack(arrays))[:, None] / 127.5 - 1


def library(function, run, **options):
    loaded = Run.load(run)
    x = function(loaded.load_model(), loaded.process, num_inference_steps=4, **options)
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def close(found, expected):
    assert_close(found, expected, rtol=0, atol=0.009)  # a step of 255 at most


def test_image_to_image(run_of_path, pictures):
    found = samples(run_of_path, "--image digit.png --strength 0.5 --class 3 8 --num-images 3 --seed 5")
    labels, image = torch.tensor([3, 8, 3]), torch.from_numpy(pictures / 127.5 - 1).float().view(1, 1, 8, 8)
    close(found, library(image_to_image, run_of_path, images=image, seeds=[5, 6, 7], strength=0.5, class_labels=labels))
    larger = samples(run_of_path, "--image digit.png --image-size 12 10 --num-images 2")
    assert larger.shape == (2, 1, 12, 10)


@pytest.mark.parametrize("more", ["", "--resample 3", "--resample 2 --sampler ddpm --guidance-scale 2"])
def test_inpainting_keeps_the_known_pixels(run_of_path, pictures, more):
    found = samples(run_of_path, f"--image digit.png --mask mask.png --num-images 3 {more}")
    assert torch.equal(found[:, 0, 3:], (torch.from_numpy(pictures).float() / 127.5 - 1)[3:].expand(3, 5, 8))
    assert (found[0, 0, :3] - found[1, 0, :3]).abs().max() > 0.05


def test_outpainting_and_upscaling(run_of_path, pictures):
    found = samples(run_of_path, "--image digit.png --outpaint 1 2 3 0 --num-images 2")
    assert found.shape == (2, 1, 12, 10)
    assert torch.equal(found[1, 0, 1:9, :8], torch.from_numpy(pictures).float() / 127.5 - 1)
    Image.new("L", (3, 2), 128).save("small.png")
    assert samples(run_of_path, "--image small.png --upscale 4 --num-images 2").shape == (2, 1, 8, 12)


def test_inversion_brings_the_image_back(run_of_path, pictures):
    found = samples(run_of_path, "--image digit.png --invert --image-class 0 --class 0 7")
    original = torch.from_numpy(pictures).float() / 127.5 - 1
    close(found[0, 0], original)
    assert found.shape == (2, 1, 8, 8)


def test_interpolation(run_of_path):
    found = samples(run_of_path, "--interpolate-seeds 3 9 --class 4 --num-images 4")
    close(found, library(interpolate, run_of_path, seeds=(3, 9), count=4, class_labels=torch.tensor([4])))
    with Image.open("a.png") as row:
        assert row.size == (4 * 34 + 2, 34 + 2)
    found = samples(run_of_path, "--interpolate-classes 4 7 --num-images 3 --seed 2")
    close(found[:1], library(sample, run_of_path, seeds=[2], class_labels=torch.tensor([4])))
    close(found[2:], library(sample, run_of_path, seeds=[2], class_labels=torch.tensor([7])))
    both = samples(run_of_path, "--interpolate-classes 4 7 --interpolate-seeds 2 5 --num-images 3")
    close(both[2:], library(sample, run_of_path, seeds=[5], class_labels=torch.tensor([7])))


def test_strip_gif_and_preview(run, capsys):
    main(["sample", str(run), *["--num-images", "2", "--strip", "--gif", "--preview-every", "1", "--out", "new/b.png"]])
    assert capsys.readouterr().out.split() == ["new/b.png", "new/b-strip.png", "new/b.gif"]
    assert {path.name for path in Path("new").iterdir()} == {"b.png", "b-strip.png", "b.gif"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--strength 0.5", "strength=0.5 needs an image"),
        ("--resample 3", "resample=3 needs an image"),
        ("--image nowhere.png", "nowhere.png"),
        ("--image mask.txt", "mask.txt"),
        ("--image digit.png --strength 0", "strength=0.0 must be above 0 and at most 1"),
        ("--image digit.png --strength 0.5 --mask mask.png", "strength and mask exclude each other; give one of them"),
        ("--image digit.png --outpaint 1 1 1 1 --mask mask.png", "mask and outpaint exclude each other"),
        ("--image digit.png --invert --upscale 2", "upscale and invert exclude each other"),
        ("--image digit.png --interpolate-seeds 0 1", "image and interpolate_seeds exclude each other"),
        ("--interpolate-classes 1 2 --interpolate-captions a b", "interpolate_classes and interpolate_captions"),
        ("--interpolate-seeds 0 1", "interpolate_seeds needs a class of 0, 1, 2"),
        ("--interpolate-seeds 0 1 --class 3 4", "class='4': with interpolation all samples have one class"),
        ("--interpolate-classes 1 cat", "class='cat' is not one of 0, 1"),
        ("--interpolate-captions a b", "trained without captions"),
        ("--interpolate-seeds 0 1 --class 3 --num-images 1", "count=1 must be at least 2"),
        ("--image digit.png --resample 2", "resample=2 needs a mask, outpaint or upscale"),
        ("--image digit.png --mask mask.png --resample 2 --sampler dpm++", "resample=2 with sampler='dpm++'"),
        ("--image digit.png --mask mask.png --resample 0", "resample=0 must be at least 1"),
        ("--image digit.png --mask black.png", "mask=black.png has nothing white"),
        ("--image digit.png --outpaint 0 0 0 0", "outpaint=(0, 0, 0, 0) must be pixels"),
        ("--image digit.png --upscale 1", "upscale=1 must be at least 2"),
        ("--image digit.png --invert --sampler euler", "sampler='euler' cannot be inverted"),
        ("--image digit.png --image-class 3", "image_class='3' needs invert"),
        ("--image digit.png --image-size 0", "image_size=(0, 0)"),
        ("--image digit.png --concat-image digit.png", "the run was trained without concat"),
        ("--negative-class 3", "guidance_scale=1 leads away from nothing"),
        ("--guide-checkpoint 1", "guidance_scale=1 leads away from nothing"),
        ("--negative-class 3 --guide-checkpoint 1 --guidance-scale 2", "guide and negative"),
        ("--negative-caption red --guidance-scale 2", "caption='red'"),
        ("--guide-checkpoint 7 --guidance-scale 2", "checkpoint='7' is not in"),
        ("--preview-every 0", "preview_every=0 must be at least 1"),
        ("--interpolate-classes 1 2 --class 3", "class='3' and a way from one class to another: give one of them"),
        ("--interpolate-seeds 99999999999999999999 1 --class 3", "99999999999999999999 does not fit 64 bits"),
        ("--image digit.png --upscale 2 --image-size 8", "upscale=2 sets the size; leave it out"),
    ],
)
def test_mistakes(run, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", str(run), "--out", "x.png", *shlex.split(options)])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("unet-denoiser: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not Path("x.png").exists()


def test_a_suffix_that_does_not_fit_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--out", "x.npy"])
    assert "x.npy: " in capsys.readouterr().err
    assert not Path("x.npy").exists()


def test_each_row_of_the_grid_is_one_class(run):
    grey = torch.linspace(-0.8, 1, 10)
    x = grey[torch.arange(12) % 10].view(12, 1, 1, 1).expand(12, 1, 8, 8)
    pixels = np.asarray(Image.open(Run.load(run).load_pipeline().save_grid(x, Path("grid.png"))), np.float32)
    height, width = pixels.shape[0] / 10, pixels.shape[1] / 2
    tiles = np.array([[pixels[int((i + 0.5) * height), int((j + 0.5) * width)] for j in (0, 1)] for i in range(10)])
    close(torch.from_numpy(tiles[:, 0] / 127.5 - 1), grey)
    close(torch.from_numpy(tiles[:2, 1] / 127.5 - 1), grey[:2])
    assert (tiles[2:, 1] == 128).all()  # cells without an image look like the background


def test_negative_class_and_guide_reach_guidance(run, monkeypatch):
    networks = {}

    def load(self, checkpoint="latest"):
        if checkpoint not in networks:
            networks[checkpoint] = randomise(UNet.from_config(self.model), seed=len(networks)).eval()
        return networks[checkpoint]

    monkeypatch.setattr(Run, "load_model", load)
    base = "--class 3 --num-images 2 --guidance-scale 2"
    plain = samples(run, base)
    labels = torch.tensor([3, 3])
    for options, expected in (
        ("--negative-class 8", {"negative": {"class_labels": torch.tensor([8])}}),
        ("--guide-checkpoint 1", {"guide": load(Run.load(run), "1")}),
    ):
        found = samples(run, f"{base} {options}")
        assert (found - plain).abs().max() > 0.1
        close(found, library(sample, run, seeds=range(2), class_labels=labels, guidance_scale=2.0, **expected))
