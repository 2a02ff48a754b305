"""Decoding and conversion of image files, scaling, cropping and augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.data import write_image
from unet_denoiser import load_data
from unet_denoiser.data.dataset import StreamIndex


def load_only_image(folder, **options):
    """Load the one image of a folder."""
    return load_data(folder, **options)[0]["image"]


def mean_colour(image):
    """Return the mean of each channel in [0, 255]."""
    return ((image.mean((1, 2)) + 1) * 127.5).round().tolist()


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [
        ("1", 1, [255, 255, 255]),
        ("L", 51, [51, 51, 51]),
        ("LA", (0, 0), [255, 0, 0]),  # clear: the background
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (9, 9, 9, 0), [255, 0, 0]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("YCbCr", (0, 128, 128), [0, 0, 0]),
    ],
)
def test_modes_become_rgb_on_the_background(tmp_path, mode, colour, rgb):
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    write_image(tmp_path / "d" / f"a.{suffix}", Image.new(mode, (8, 8), colour))
    assert mean_colour(load_only_image(tmp_path / "d", channels=3, background="#ff0000")) == rgb


def test_transparent_palette_entries_and_colours(tmp_path):
    """A palette's entry and a PNG's one transparent colour count like alpha."""
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    write_image(tmp_path / "p" / "a.png", palette, transparency=1)
    write_image(tmp_path / "q" / "a.png", Image.new("RGB", (8, 8), (10, 20, 30)), transparency=(10, 20, 30))
    write_image(tmp_path / "r" / "a.png", palette)
    assert mean_colour(load_only_image(tmp_path / "p")) == [255, 255, 255]
    assert mean_colour(load_only_image(tmp_path / "q")) == [255, 255, 255]
    assert mean_colour(load_only_image(tmp_path / "r")) == [10, 20, 30]
    assert load_only_image(tmp_path / "p", channels=4)[3].unique().item() == -1  # kept as alpha


def test_16_bit_greys_keep_their_precision(tmp_path):
    values = np.arange(20_000, 20_064, dtype=np.uint16).reshape(8, 8)  # within one step of 8 bits
    write_image(tmp_path / "d" / "deep.png", Image.fromarray(values))
    expected = torch.from_numpy(values.astype(np.float32)) / 32767.5 - 1
    assert_close(load_only_image(tmp_path / "d")[0], expected)
    assert_close(load_only_image(tmp_path / "d", channels=4), torch.stack([expected] * 3 + [torch.ones(8, 8)]))
    write_image(tmp_path / "t" / "deep.tif", Image.fromarray(values.astype(np.int32)))
    assert_close(load_only_image(tmp_path / "t")[0], expected)


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    image = np.zeros((16, 8, 3))
    image[:8] = 255
    write_image(tmp_path / "d" / "a.png", image, exif=exif)
    data = load_data(tmp_path / "d")
    assert data.image_size == (8, 16)
    assert data[0]["image"][0, 0].tolist() == [-1.0] * 8 + [1.0] * 8


def test_alpha_does_not_bleed_when_scaled(tmp_path):
    """Scaling averages premultiplied pixels, so the colour of clear ones does not count."""
    array = np.zeros((16, 16, 4))
    array[:, ::2] = (255, 0, 0, 255)
    write_image(tmp_path / "d" / "a.png", array)
    image = load_only_image(tmp_path / "d", channels=4, image_size=4)
    assert mean_colour(image)[:3] == [255, 0, 0]
    assert 100 < mean_colour(image)[3] < 155


def halves(height, width):
    """Return an image that is white on the left half and black on the right."""
    array = np.zeros((height, width))
    array[:, : width // 2] = 255
    return array


def test_resize_modes(tmp_path):
    write_image(tmp_path / "d" / "a.png", halves(16, 32))
    by_mode = {
        mode: load_only_image(tmp_path / "d", image_size=16, resize_mode=mode, background="black")[0]
        for mode in ("center_crop", "pad", "stretch")
    }
    assert (by_mode["center_crop"][8] > 0).tolist() == [True] * 8 + [False] * 8
    assert_close(by_mode["center_crop"][:, :4], torch.ones(16, 4))
    assert_close(by_mode["pad"][[0, 3, 12, 15]], -torch.ones(4, 16))
    assert_close(by_mode["pad"][4:12, :5], torch.ones(8, 5))
    assert by_mode["stretch"][0, 0] == by_mode["stretch"][15, 0] == 1


def test_augmentation_depends_on_seed_and_position_alone(tmp_path):
    write_image(tmp_path / "d" / "a.png", np.random.default_rng(0).integers(0, 255, (16, 40, 3)))
    data = load_data(tmp_path / "d", image_size=16, resize_mode="random_crop", horizontal_flip=True)
    plain = data[0]["image"]
    assert torch.equal(plain, data[0]["image"])
    views = [data[StreamIndex(0, position, 1)]["image"] for position in range(60)]
    assert torch.equal(views[7], data[StreamIndex(0, 7, 1)]["image"])
    assert not torch.equal(views[7], data[StreamIndex(0, 7, 2)]["image"])
    whole = load_data(tmp_path / "d", image_size=(16, 40))[0]["image"]
    crops = {(x, flip) for view in views for x in range(25) for flip in (False, True)
             if torch.equal(view.flip(-1) if flip else view, whole[..., x : x + 16])}  # fmt: skip
    assert len(crops) > 20  # of 50
    assert {x for x, _ in crops} >= {0, 24} or len({x for x, _ in crops}) > 15
    assert {flip for _, flip in crops} == {False, True}
