"""Images as latents: the wrapper, and runs that are trained on them."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from support.autoencoders import small_kl, small_tiny
from support.data import MINILM, TINY, failure, write_folder
from unet_denoiser import DataConfig, Run, load_data
from unet_denoiser.cli.app import main
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.load import load_autoencoder, with_found_values
from unet_denoiser.models.autoencoder import Autoencoder


def test_run_on_latents(captioned_folder, vae, tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", str(captioned_folder), "--out", str(run), "--vae", str(vae), "--text-encoder", MINILM, *TINY])
    loaded = Run.load(run)
    assert (loaded.model.in_channels, loaded.model.out_channels, loaded.model.image_size) == (3, 3, 4)
    assert loaded.data.image_size == (8, 8)
    assert loaded.process.data_range is None
    again = load_data(loaded.data)
    assert (again.channels, again.image_size) == (3, (4, 4))
    main(["sample", str(run), "--caption", "red", "--num-images", "2", "--num-inference-steps", "2", "--separate"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (8, 8)
    assert Image.open(next((run / "samples").glob("*.png"))).mode == "RGB"
    drawn = np.zeros((8, 8), np.uint8)
    drawn[:3] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    image, few = str(captioned_folder / "2.png"), ["--num-inference-steps", "2", "--separate"]
    sampling = ["sample", str(run), *few, "--num-images", "1", "--caption", "red", "--image", image]
    main([*sampling, "--mask", str(tmp_path / "mask.png")])
    found = np.asarray(Image.open(run / "samples-separate" / "000000.png"))
    assert np.array_equal(found[3:], np.asarray(Image.open(image))[3:])  # the pixels of the file, not decoded ones
    main([*sampling, "--outpaint", "0", "2", "0", "0", "--strip"])
    assert Image.open(run / "samples-separate" / "000000.png").size == (10, 8)
    main(["sample", str(run), *few, "--interpolate-captions", "red drake", "wall", "--image-size", "12"])
    assert Image.open(run / "samples-separate" / "000015.png").size == (12, 12)
    assert "upscale=2" in failure([*sampling, "--upscale", "2"], capsys)
    assert "multiples of 2" in failure([*sampling, "--image-size", "7"], capsys)


def test_latents_of_images_and_mirrored_images(image_folder, vae):
    plain, data = load_data(str(image_folder)), load_data(str(image_folder), vae=str(vae), horizontal_flip=True)
    straight = Autoencoder(vae)
    x = plain[2]["image"][None]
    kinds = [straight.encode(x)[0], straight.encode(x.flip(-1))[0]]
    drawn = [data[StreamIndex(2, position, 0)]["image"] for position in range(20)]
    which = [min(range(2), key=lambda i: (z - kinds[i]).abs().max()) for z in drawn]
    assert 4 < sum(which) < 16
    for z, kind in zip(drawn, which, strict=True):
        torch.testing.assert_close(z, kinds[kind], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(data[2]["image"], kinds[0], rtol=2e-3, atol=2e-3)
    assert all(torch.equal(z, data[StreamIndex(2, i, 0)]["image"]) for i, z in enumerate(drawn))


def test_warns_about_latents_of_another_scale(image_folder, tmp_path):
    small_kl(in_channels=3, out_channels=3, scaling_factor=1e-3).save_pretrained(tmp_path / "off")
    with pytest.warns(UserWarning, match="standard deviation of .* standardize_latents"):
        load_data(str(image_folder), vae=str(tmp_path / "off"))


def test_measured_statistics_stay_with_the_run(image_folder, vae):
    config = DataConfig(str(image_folder), vae=str(vae), standardize_latents=True)
    data = load_data(config)
    latents = torch.stack([data[i]["image"] for i in range(len(data))])
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-2)
    torch.testing.assert_close(latents.square().mean((0, 2, 3)), torch.ones(3), rtol=0, atol=2e-2)
    found = DataConfig.from_dict(json.loads(json.dumps(with_found_values(config, data).__dict__)))
    assert found.latent_mean == data.mean
    decoded = load_autoencoder(found).decode(latents)
    straight = Autoencoder(vae)
    plain = load_data(str(image_folder))
    expected = straight.decode(straight.encode(torch.stack([plain[i]["image"] for i in range(6)])))
    torch.testing.assert_close(decoded, expected, rtol=5e-3, atol=5e-3)


def test_a_changed_image_is_encoded_again(image_folder, vae):
    before = load_data(str(image_folder), vae=str(vae))[0]["image"]
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(image_folder / "0.png")
    assert not torch.equal(load_data(str(image_folder), vae=str(vae))[0]["image"], before)


def test_autoencoder_tiny(image_folder, tmp_path):
    small_tiny(3).save_pretrained(tmp_path / "tiny")
    data = load_data(str(image_folder), vae=str(tmp_path / "tiny"))
    assert (data.channels, data.image_size) == (4, (4, 4))
    x = load_data(str(image_folder))[1]["image"][None]
    expected = 2 * diffusers.AutoencoderTiny.from_pretrained(tmp_path / "tiny").encode(x).latents[0]
    torch.testing.assert_close(data[1]["image"], expected, rtol=2e-3, atol=2e-3)


def test_latents_of_paired_images(image_folder, vae, tmp_path):
    other = write_folder(tmp_path / "other", seed=1)
    data = load_data(str(image_folder), concat=str(other), vae=str(vae))
    assert (data.channels, data.concat_channels) == (3, 3)
    expected = Autoencoder(vae).encode(load_data(str(other))[4]["image"][None])[0]
    torch.testing.assert_close(data[4]["concat"], expected, rtol=2e-3, atol=2e-3)
