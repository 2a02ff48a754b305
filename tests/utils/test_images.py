"""Pictures: values, places in the grid, formats."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from unet_denoiser.utils.images import _printable, make_grid, save_grid, save_image, to_uint8


def test_values():
    assert to_uint8(torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([-2.0, 0.0, 2.0]), (-2.0, 2.0)).tolist() == [0, 128, 255]


def test_uint8_comes_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_single_image(tmp_path, channels, mode):
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = save_image(pixels, tmp_path / "new" / "a.png")
    with Image.open(path) as image:
        assert image.mode == mode
        array = np.array(image).reshape(5, 7, channels)
    assert np.array_equal(array, pixels.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 9), (1, 4, 4, 4)])
def test_what_is_no_picture_becomes_npy(tmp_path, shape):
    x = torch.randn(shape)
    path = save_image(x, tmp_path / "a.png")
    assert path.suffix == ".npy"
    assert np.array_equal(np.load(path), x.numpy())
    assert save_grid(torch.randn(6, *shape), tmp_path / "grid.png").suffix == ".npy"


def test_grid_places_row_by_row(tmp_path):
    x = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 40, 40)
    with Image.open(save_grid(x, tmp_path / "g.png", columns=3)) as image:
        assert image.size == (3 * 42 + 2, 2 * 42 + 2)
        centres = [image.getpixel((22 + 42 * (i % 3), 22 + 42 * (i // 3))) for i in range(6)]
    assert centres == [0, 51, 102, 153, 204, 255]


def test_small_images_are_enlarged_by_a_whole_factor(tmp_path):
    x = torch.tensor([[[[-1.0, 1.0], [1.0, -1.0]]]])
    with Image.open(save_grid(x, tmp_path / "g.png")) as image:
        assert image.size == (36, 36)
        assert (image.getpixel((3, 3)), image.getpixel((17, 17)), image.getpixel((18, 17))) == (0, 0, 255)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_names_stand_beside_the_rows_and_change_no_image(tmp_path, channels):
    x = torch.rand(6, channels, 40, 40) * 2 - 1
    path = save_grid(x, tmp_path / "g.png", columns=2, row_names=["cats", "a" * 200, ""])
    grid = make_grid(x, 2).permute(1, 2, 0).numpy()
    with Image.open(path) as image:
        pixels = np.array(image).reshape(image.height, image.width, channels)
    assert np.array_equal(pixels[:, : grid.shape[1]], grid)
    beside = pixels[:, grid.shape[1] :, 0].reshape(3, -1)
    assert (beside == 255).any(1).all()  # an empty name is replaced by the number of its row
    assert pixels.shape[1] < 1000


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("K\u00f6ln  d'\u00e9t\u00e9\n", "Koln d'ete"),
        ("\u72ac", ""),
        ("\u72ac dog", "? dog"),
        ("???", "???"),
        ("\ud800", ""),
        ("\u05d0\U0001f600", ""),
    ],
)
def test_letters_that_the_font_lacks(tmp_path, name, shown):
    assert _printable(name, ImageFont.load_default(14)) == shown
    save_grid(torch.zeros(1, 1, 8, 8), tmp_path / "g.png", row_names=[name])
