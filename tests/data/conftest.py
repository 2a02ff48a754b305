"""Fixtures of the datasets' tests: an empty cache, folders of images and captions, a small VAE."""

import pytest

from support.autoencoders import small_kl
from support.data import write_captions, write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def image_folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.fixture
def captioned_folder(image_folder):
    return write_captions(image_folder)


@pytest.fixture
def vae(tmp_path):
    small_kl(in_channels=3, out_channels=3, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"
