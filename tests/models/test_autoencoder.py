"""Autoencoders and cached latents, against diffusers."""

import numpy as np
import pytest
import torch

from support.autoencoders import small_kl, small_tiny
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.data.wrappers.latents import LatentDataset
from unet_denoiser.models.autoencoder import Autoencoder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_images(count=6, channels=1, size=8):
    return np.random.default_rng(0).uniform(-1, 1, (count, channels, size, size)).astype(np.float32)


SCALES = {
    "scaling_factor": ({"scaling_factor": 0.5}, lambda z: z * 0.5),
    "shift_factor": ({"scaling_factor": 0.5, "shift_factor": 0.25}, lambda z: (z - 0.25) * 0.5),
    "statistics": (
        {"latents_mean": [1.0, 2.0, 3.0], "latents_std": [2.0, 4.0, 8.0]},
        lambda z: (z - torch.tensor([1.0, 2, 3]).view(-1, 1, 1)) / torch.tensor([2.0, 4, 8]).view(-1, 1, 1),
    ),
}


@pytest.mark.parametrize("name", SCALES)
def test_kl_is_what_diffusers_computes(name, tmp_path):
    options, scaled = SCALES[name]
    vae = small_kl(**options)
    vae.save_pretrained(tmp_path / "vae")
    ours, x = Autoencoder(tmp_path / "vae"), torch.from_numpy(random_images())
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()
        decoded = vae.decode(z).sample.clamp(-1, 1)
    assert (ours.factor, ours.channels, ours.image_channels) == (2, 3, 1)
    torch.testing.assert_close(ours.encode(x), scaled(z))
    torch.testing.assert_close(ours.decode(ours.encode(x), batch_size=4), decoded, rtol=1e-4, atol=1e-5)


def test_a_tiny_autoencoder_in_a_pipelines_folder_is_what_diffusers_computes(tmp_path):
    vae = small_tiny()
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    ours, x = Autoencoder(tmp_path / "pipeline"), torch.from_numpy(random_images())
    with torch.no_grad():
        z = vae.encode(x).latents
        decoded = vae.decode(z).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.encode(x), 2 * z)
    torch.testing.assert_close(ours.decode(2 * z), decoded, rtol=1e-4, atol=1e-5)


def test_a_trained_autoencoder_reconstructs_the_image(tmp_path):
    """Decoded latents, through the cache's float16 and the measured statistics, are the digits again."""
    from unet_denoiser.data.sources.arrays import digits

    images = digits()[0][:512]
    x = torch.from_numpy(images)
    vae = small_kl(block_out_channels=(16, 16), latent_channels=4)
    optimizer = torch.optim.Adam(vae.parameters(), 4e-3)
    for _ in range(120):
        batch = x[torch.randint(len(x), (32,))]
        loss = (vae.decode(vae.encode(batch).latent_dist.mode()).sample - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.save_pretrained(tmp_path / "vae")
    autoencoder = Autoencoder(tmp_path / "vae")
    data = LatentDataset(ArrayDataset(images[:32]), autoencoder, "digits", standardize=True)
    latents = torch.stack([data[i]["image"] for i in range(32)])
    error = (autoencoder.decode(latents) - x[:32]).square().mean()
    assert error < 0.1 * x.var()
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-2)
    torch.testing.assert_close(latents.square().mean((0, 2, 3)), torch.ones(4), rtol=0, atol=2e-2)


@pytest.fixture
def autoencoder(tmp_path):
    small_kl(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return Autoencoder(tmp_path / "vae")


def test_latents_of_images_and_of_their_mirror_images_are_cached(autoencoder):
    images = torch.from_numpy(random_images())
    data = LatentDataset(ArrayDataset(images.numpy()), autoencoder, "key", flip=True)
    assert (data.channels, data.image_size, len(data)) == (3, (4, 4), 6)
    latents = torch.tensor(data.latents.array).float()[:, :, 0]  # (6 images, 2 with the mirrored ones, C, h, w)
    for mirrored, x in enumerate((images, images.flip(-1))):
        kept = (latents[:, mirrored] - data.shift) * data.scale
        torch.testing.assert_close(kept, autoencoder.encode(x), rtol=2e-3, atol=2e-3)
    # why both are kept: mirrored latents are not the latents of the mirrored image
    assert (latents[0, 0].flip(-1) - latents[0, 1]).abs().max() > 0.01


def test_images_are_encoded_once(autoencoder, monkeypatch):
    first = LatentDataset(ArrayDataset(random_images()), autoencoder, "key")[3]["image"]
    monkeypatch.setattr(autoencoder, "encode_unscaled", lambda x: pytest.fail("encoded again"))
    assert torch.equal(LatentDataset(ArrayDataset(random_images()), autoencoder, "key")[3]["image"], first)
    with pytest.raises(pytest.fail.Exception):
        LatentDataset(ArrayDataset(random_images()), autoencoder, "another key")
    with pytest.raises(pytest.fail.Exception):
        LatentDataset(ArrayDataset(random_images()), autoencoder, "key", flip=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"size": 9}, r"image_size=\(9, 9\): vae=.* takes multiples of 2"),
        ({"channels": 3}, r"channels=3: vae=.* takes 1"),
    ],
)
def test_images_of_a_wrong_shape_are_refused(autoencoder, shape, message):
    with pytest.raises(ValueError, match=message):
        LatentDataset(ArrayDataset(random_images(**shape)), autoencoder, "key")


def test_a_wrong_folder_or_name_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        Autoencoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"^vae=no-such-vae cannot be loaded[^\n]*$"):
        Autoencoder("no-such-vae")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="it holds a UNet2DModel; AutoencoderKL and AutoencoderTiny are supported"):
        Autoencoder(tmp_path / "unet")
