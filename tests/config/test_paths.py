"""Paths as people type them: the home directory, and what is no path here."""

import os

import pytest
import torch

from support.networks import small
from unet_denoiser import Diffusion, Run, UNet, load_data
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.editing import EditingConfig
from unet_denoiser.config.paths import is_hub_name, local_path
from unet_denoiser.models.text_encoder import TextEncoder
from unet_denoiser.utils.images import save_grid


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory; the working directory is another, which stays empty."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path / "home"
    assert list((tmp_path / "work").iterdir()) == []


def test_a_tilde_is_the_home_directory(home):
    assert local_path("~/x") == home / "x"
    assert local_path("~") == home
    assert local_path("a/~/b").parts == ("a", "~", "b")
    config = DataConfig("hf:~/d", text_encoder="~/t", vae="~/v", concat="~/c")
    assert config.source == f"hf:{home}/d"
    assert (config.text_encoder, config.vae, config.concat) == (f"{home}/t", f"{home}/v", f"{home}/c")
    edit = EditingConfig(image="~/i.png", mask="~/m.png")
    assert (edit.image, edit.mask) == (home / "i.png", home / "m.png")


def test_python_callers_may_give_one(home):
    small(in_channels=3).save_pretrained("~/m")
    Diffusion().save_pretrained("~/m")
    UNet.from_pretrained("~/m")
    assert Diffusion.from_pretrained("~/m").to_dict() == Diffusion().to_dict()
    save_grid(torch.zeros(1, 3, 8, 8), "~/d/a.png")
    assert len(load_data("~/d")) == 1
    assert (home / "m" / "scheduler_config.json").is_file()
    for call in (Run.load, TextEncoder):
        with pytest.raises(FileNotFoundError, match=str(home)):
            call("~/gone")


@pytest.mark.parametrize("text", ["", "file:///tmp/x", "https://host/x", "s3://b/x"])
def test_what_is_no_path_here(text):
    with pytest.raises(ValueError, match=r"names no file|is a URL"):
        local_path(text)


@pytest.mark.skipif(os.name != "posix", reason="there it is a path")
def test_a_path_of_windows():
    with pytest.raises(ValueError, match="of Windows"):
        local_path("C:\\runs")


def test_without_a_home_directory(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    with pytest.raises(ValueError, match="no home directory is known"):
        local_path("~/x")
    assert local_path("x").name == "x"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("owner/name", True), ("./name", False), ("/name", False), ("~/name", False), ("name", False), ("a/b/c", False)],
)
def test_names_of_hub_repositories(name, expected):
    assert is_hub_name(name) is expected
