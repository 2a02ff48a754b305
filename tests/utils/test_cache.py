"""The cache directory, which every cache of the package shares."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unet_denoiser import load_data
from unet_denoiser.data.sources import verification
from unet_denoiser.utils import cache
from unet_denoiser.utils.cache import cache_directory, compute_once, fingerprint, provide_caches


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory that a quoted "~" in UNET_DENOISER_CACHE stands for; the working directory is another."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("UNET_DENOISER_CACHE", "~/x")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def write_images(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / name)
    return folder


def test_a_tilde_is_the_home_directory_for_every_cache(home):
    images = write_images(home.parent / "images", ["a.png"])
    load_data(images)
    compute_once("features", "key", lambda folder: (folder / "file").write_text(""))
    assert cache_directory() == home / "x"
    assert sorted(path.name for path in (home / "x").iterdir()) == ["features", "scans"]
    assert list((home / "x" / "scans").glob("*.json"))
    assert list((home.parent / "work").iterdir()) == []


def test_the_default_directory(home, monkeypatch):
    monkeypatch.delenv("UNET_DENOISER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == home / ".cache" / "unet-denoiser"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/y")
    assert cache_directory() == home / "y" / "unet-denoiser"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore those
    assert cache_directory() == home / ".cache" / "unet-denoiser"


@pytest.mark.parametrize("place", ["a file", "a dead link", "no home"])
def test_without_a_place_the_cache_is_temporary_and_that_is_said_once(home, monkeypatch, place):
    given = home / place
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(given))
    if place == "no home":
        monkeypatch.delenv("UNET_DENOISER_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "")
        cache._find_problem.cache_clear()
        cache._usable.cache_clear()
    elif place == "a file":
        given.touch()
    else:
        given.symlink_to(home / "gone")
    images = write_images(home.parent / "images", ["a.png"])
    with pytest.warns(UserWarning, match="so the cache is a temporary directory") as warned:
        folders = [load_data(images) and compute_once("features", key, Path.exists) for key in "ab"]
    assert all(folder.is_dir() for folder in folders)
    assert len(warned) == 1


def test_a_disk_that_fills_up(home):
    calls = []

    def compute(folder):
        calls.append(folder)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "file").touch()

    with pytest.warns(UserWarning, match="the disk is full"):
        folder = compute_once("features", "full", compute)
    assert (folder / "file").is_file()
    assert not list((home / "x" / "features").glob("full*[!k]"))


def test_other_libraries_keep_their_files_in_ours(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    monkeypatch.setenv("MPLCONFIGDIR", "")
    (home / "file").touch()
    provide_caches()
    assert os.environ["XDG_CACHE_HOME"] == str(home / "x")


def test_a_scan_of_an_earlier_version_is_found(home, monkeypatch):
    """Its file is named by the folder, and holds [stamp, header] by each image's path."""
    images = write_images(home.parent / "images", ["a.png"])
    stat = (images / "a.png").stat()
    entries = {"a.png": [[stat.st_size, stat.st_mtime_ns], [True, 8, 8, None]]}
    name = verification.sha256(str(images).encode()).hexdigest()[:24]
    (home / "x" / "scans").mkdir(parents=True)
    (home / "x" / "scans" / f"{name}.json").write_text(json.dumps(entries))
    monkeypatch.setattr(verification, "open_image", lambda *args: pytest.fail("scanned again"))
    assert load_data(images).channels == 1


@pytest.mark.parametrize(
    "header", [[True, 8, 8, "is broken"], [True, 8], [True, "8", 8, None], [True, 8, 8, None, 1], 5]
)
def test_a_scan_is_not_trusted_about_failures_or_if_it_is_damaged(home, header):
    images = write_images(home.parent / "images", ["a.png"])
    load_data(images)
    (path,) = (home / "x" / "scans").glob("*.json")
    entries = json.loads(path.read_text())
    for broken in ({"a.png": [entries["a.png"][0], header]}, {"a.png": header}, {"a.png": [[], [True, 8, 9, None]]}):
        path.write_text(json.dumps(broken))
        assert load_data(images).image_size == (8, 8)
        assert json.loads(path.read_text()) == entries


@pytest.mark.skipif(os.name != "posix", reason="only there a file's name may be any bytes")
def test_a_file_name_that_is_not_utf_8_is_remembered(home, monkeypatch):
    images = write_images(home.parent / "images", ["a.png"])
    (images / "a.png").rename(images / os.fsdecode(b"\xff.png"))
    load_data(images)
    monkeypatch.setattr(verification, "open_image", lambda *args: pytest.fail("scanned again"))
    assert len(load_data(images)) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows lets few users make links")
def test_fingerprints_see_changes_behind_links(tmp_path):
    real = write_images(tmp_path / "real", ["a.png"])
    (real / "back").symlink_to(".")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "link").symlink_to(real)
    before = fingerprint([tmp_path / "d"])
    assert fingerprint([tmp_path / "d"]) == before
    (real / "a.png").write_bytes(b"changed")
    assert fingerprint([tmp_path / "d"]) != before
