"""The line that says what a dataset has."""

import numpy as np
import pytest
from PIL import Image

from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.dataset import StreamDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.data.summary import describe_data


@pytest.fixture
def photos(tmp_path):
    for i, name in enumerate(["cats", "dogs"] * 3):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (90, 70), (40 * i, 0, 0)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_whose_size_we_chose(photos):
    config = DataConfig(str(photos))
    text = describe_data(config, load_data(config))
    start = f"{photos}: 6 images of 64x64 (chosen; --image-size changes it), 3 channels; 2 classes (cats, dogs)"
    assert text.startswith(start)


def test_options_that_were_given(photos):
    config = DataConfig(str(photos), image_size=(8, 16), channels=1, concat="downscaled:2")
    text = describe_data(config, load_data(config))
    assert ": 6 images of 8x16, 1 channel; with 1 channel of another image (downscaled:2); 2 classes" in text
    config = DataConfig(str(photos), image_size=16, aspect_buckets=True)
    assert ": 6 images of about 16x16 in several shapes, 3 channels" in describe_data(config, load_data(config))


def test_where_classes_captions_and_numbers_come_from():
    images, labels = np.zeros((12, 1, 8, 8), np.uint8), np.arange(12) % 7
    data = ArrayDataset(images, labels, captions=list("abcdefghijkl"), vectors=np.zeros((12, 2)))
    data.class_names = ["ape", "bee", "cat", "dog", "elk", "fox", "gnu"]
    data.origins = {"class_labels": "array labels", "caption": "array captions", "vector": "array vectors"}
    assert describe_data(DataConfig("x.npz"), data) == (
        "x.npz: 12 images of 8x8, 1 channel; 7 classes (ape, bee, cat, dog, elk, ...) from array labels; "
        "captions from array captions (not learned without a text_encoder); vectors of 2 numbers from array vectors"
    )


def test_a_stream_and_data_without_anything():
    stream = StreamDataset()
    stream.channels, stream.image_size = 3, (32, 32)
    assert describe_data(DataConfig("hf:x", image_size=32), stream) == (
        "hf:x: a stream of images of 32x32, 3 channels; no classes"
    )
