"""Verification of all images before training: bad files, and the cache of its results."""

import os

import numpy as np
import pytest
from PIL import Image

from support.data import write_image
from unet_denoiser import load_data
from unet_denoiser.data.sources import verification
from unet_denoiser.data.transforms import UnreadableItemError


@pytest.fixture
def bad_folder(tmp_path):
    """Make six files, five of them bad, each in another way."""
    folder = tmp_path / "d"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3))
    content = write_image(folder / "fine.png", noise).read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    jpeg = write_image(folder / "cut.jpg", noise).read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    write_image(folder / "small.png", np.zeros((64, 31, 3)))
    return folder


def test_verification_names_every_bad_file(bad_folder):
    with pytest.raises(ValueError, match="5 of 6 images") as info:
        load_data(bad_folder, image_size=64)
    text = str(info.value)
    for words in (
        "cut.png cannot be read as an image",
        "cut.jpg cannot be read as an image",
        "empty.png is empty",
        "text.jpg cannot be read as an image: no image format that is known",
        "small.png is 64x31, less than half of image_size 64x64",
        "--on-bad skip",
    ):
        assert words in text
    with pytest.warns(UserWarning, match="5 of 6 images .* They are left out"):
        data = load_data(bad_folder, image_size=64, on_bad="skip")
    assert data.files == ["fine.png"]


def test_refuses_folders_without_usable_images(tmp_path):
    write_image(tmp_path / "d" / "a.png", np.zeros((8, 8))).write_bytes(b"")
    with pytest.warns(UserWarning, match="1 of 1"), pytest.raises(ValueError, match="None is left"):
        load_data(tmp_path / "d", on_bad="skip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images were found in .*empty"):
        load_data(tmp_path / "empty")


def test_verification_is_cached_until_a_file_changes(tmp_path, monkeypatch):
    for i in range(3):
        write_image(tmp_path / "d" / f"{i}.png", np.full((8, 8), i))
    decoded = []
    original = verification.open_image
    monkeypatch.setattr(verification, "open_image", lambda *a: decoded.append(a[1]) or original(*a))
    load_data(tmp_path / "d")
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]
    decoded.clear()
    load_data(tmp_path / "d")
    assert decoded == []
    (tmp_path / "d" / "1.png").write_bytes(b"now broken")
    with pytest.raises(ValueError, match=r"1 of 3 .* 1\.png"):
        load_data(tmp_path / "d")
    assert decoded == ["1.png"]


def test_verification_works_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "file"))
    write_image(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    assert len(load_data(tmp_path / "d")) == 1


def test_failures_are_decoded_anew(tmp_path, monkeypatch):
    """A decoder may be installed, or an error of the device be over, without a change of the file."""
    write_image(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    write_image(tmp_path / "d" / "b.png", np.zeros((8, 8)))
    original = verification.open_image

    def fail(source, name):
        if name == "b.png":
            raise UnreadableItemError(name, "cannot be read as an image: Too many open files")
        return original(source, name)

    monkeypatch.setattr(verification, "open_image", fail)
    with pytest.warns(UserWarning, match=r"1 of 2 images .* b\.png .* Too many open files"):
        assert len(load_data(tmp_path / "d", on_bad="skip")) == 1
    monkeypatch.setattr(verification, "open_image", original)
    assert load_data(tmp_path / "d", on_bad="skip").files == ["a.png", "b.png"]


def test_what_could_be_decoded_is_decoded_again_with_another_pillow_or_other_permissions(tmp_path, monkeypatch):
    path = write_image(tmp_path / "d" / "a.png", np.zeros((8, 8)))
    decoded = []
    original = verification.open_image
    monkeypatch.setattr(verification, "open_image", lambda *a: decoded.append(a[1]) or original(*a))
    load_data(tmp_path / "d")
    monkeypatch.setattr(verification.PIL, "__version__", "0")
    load_data(tmp_path / "d")
    assert decoded == ["a.png"] * 2
    stat = path.stat()
    path.chmod(0o600)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as after a replacement of the same size and time
    load_data(tmp_path / "d")
    load_data(tmp_path / "d")
    assert decoded == ["a.png"] * (3 if os.name == "posix" else 2)


def test_large_scans_are_read_and_bombs_are_not(tmp_path):
    """The limit is above Pillow's own, and counts the pixels that a header claims."""
    Image.new("1", (13_500, 13_500)).save(tmp_path / "scan.png")
    assert verification.Header.read(str(tmp_path / "scan.png"), "scan") == (True, 13_500, 13_500, None)
    for side in (30_000, 100_000):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / "a.pgm").write_text(f"P5 {side} {side} 255 ")
        with pytest.raises(ValueError, match=r"a\.pgm has more than 536 megapixels, and is not decoded"):
            load_data(tmp_path / "d")
