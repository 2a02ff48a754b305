"""Decoding and conversion of image files, scaling, cropping and augmentation."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.testing import assert_close

from support.data import write_image
from unet_denoiser import load_data
from unet_denoiser.data.dataset import StreamIndex
from unet_denoiser.data.transforms import open_image


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
    packed = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # Pillow 12 does not read its own without
    write_image(tmp_path / "d" / f"a.{suffix}", Image.new(mode, (8, 8), colour), **packed)
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


# ---- colour profiles -------------------------------------------------------------------------------------------------


def icc_profile(space, **tags):
    """A profile of version 2: its curve and primaries, or a table to Lab, as tags."""
    tags = {
        "desc": b"desc\0\0\0\0\0\0\0\2x\0" + bytes(79),
        "cprt": b"text\0\0\0\0none\0",
        "wtpt": xyz(0.9642, 1, 0.8249),
    } | tags
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        padded = tag + bytes(-len(tag) % 4)
        table += name.encode() + struct.pack(">II", offset + len(body), len(padded))
        body += padded
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"test", 0x02400000, b"mntr", space, b"Lab " if "A2B0" in tags else b"XYZ "
    )
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(0.9642, 1, 0.8249)[8:]
    return head.ljust(128, b"\0") + table + body


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *[round(value * 65536) for value in values])


def gamma(value):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def wide_profile():
    """Primaries of Display P3 with a gamma of 2.2."""
    curves = dict.fromkeys(("rTRC", "gTRC", "bTRC"), gamma(2.2))
    red, green, blue = xyz(0.51512, 0.2412, -0.00105), xyz(0.29198, 0.69225, 0.04189), xyz(0.1571, 0.06657, 0.78407)
    return icc_profile(b"RGB ", rXYZ=red, gXYZ=green, bXYZ=blue, **curves)


def managed(image, profile):
    """Return the colours of an image as colour-managed software shows them."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")


COLOURS = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_colours_are_those_that_the_profile_means(tmp_path, mode, suffix):
    image = Image.fromarray(COLOURS).quantize(16) if mode == "P" else Image.fromarray(COLOURS).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    if suffix == "webp" and mode == "P":
        image = image.convert("RGB")
    expected = np.array(managed(image.convert("RGB"), wide_profile()))
    assert np.abs(expected.astype(int) - np.asarray(image.convert("RGB"))).max() > 20
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    write_image(tmp_path / "d" / f"a.{suffix}", image, icc_profile=wide_profile(), **options)
    pixels = load_only_image(tmp_path / "d", channels=4)
    assert_close(pixels[:3], torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1, atol=1e-5, rtol=0)
    assert ((pixels[3].mean() + 1) * 127.5).round() == (77 if mode == "RGBA" else 255)


def test_profiles_of_greys_and_exif_together(tmp_path):
    """A grey image stays grey, of the values that its curve means, and is turned as well."""
    exif = Image.Exif()
    exif[274] = 3  # upside down
    image = Image.fromarray(COLOURS[..., 0])
    profile = icc_profile(b"GRAY", kTRC=gamma(1.0))
    write_image(tmp_path / "d" / "a.png", image, icc_profile=profile, exif=exif)
    data = load_data(tmp_path / "d")
    expected = np.asarray(managed(image, profile))[::-1, ::-1, 0] / 127.5 - 1
    assert data.channels == 1
    assert_close(data[0]["image"][0], torch.from_numpy(expected.astype(np.float32)), atol=0.02, rtol=0)
    assert (data[0]["image"][0] - torch.from_numpy(COLOURS[::-1, ::-1, 0] / 127.5 - 1)).abs().max() > 0.2


def test_profiles_of_printing_inks(tmp_path):
    """A table from the 16 corners of CMYK to a lightness, by which all inks are greyer than Pillow takes them to be."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    lightness = (255 - inks @ [50, 60, 40, 90]).astype(np.uint8)
    corners = np.stack([lightness, *[np.full(16, 128, np.uint8)] * 2], -1)
    ramp = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + struct.pack(">9i", *[65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)])
    profile = icc_profile(b"CMYK", A2B0=table + 4 * ramp + corners.tobytes() + 3 * ramp)
    image = Image.fromarray(COLOURS).convert("CMYK")
    expected = np.array(managed(image, profile))
    assert np.abs(expected.astype(int) - np.asarray(image.convert("RGB"))).max() > 20
    write_image(tmp_path / "d" / "a.tif", image, icc_profile=profile)
    assert_close(load_only_image(tmp_path / "d"), torch.from_numpy(expected).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("kind", ["sRGB", "broken", "other space", "16 bits"])
def test_profiles_that_change_nothing(tmp_path, kind):
    profiles = {"sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "broken": b"no profile"}
    profile = profiles.get(kind, icc_profile(b"GRAY", kTRC=gamma(1.0)))
    image = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 250 if kind == "16 bits" else COLOURS)
    write_image(tmp_path / "d" / "a.png", image)
    plain = load_only_image(tmp_path / "d")
    write_image(tmp_path / "d" / "a.png", image, icc_profile=profile)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(load_only_image(tmp_path / "d"), plain)
    assert ["an ICC profile of 10 bytes cannot be used" in str(w.message) for w in said] == [True] * (kind == "broken")


def test_masks_have_no_colours(tmp_path):
    path = write_image(tmp_path / "a.png", Image.fromarray(COLOURS), icc_profile=wide_profile())
    assert np.array_equal(np.asarray(open_image(str(path), colours=False)), COLOURS)
