"""Distances to the nearest training image: what a copy is, and which images are searched."""

import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser import ArrayDataset
from unet_denoiser.data.load import load_data
from unet_denoiser.evaluation import memorization
from unet_denoiser.evaluation.memorization import compare_neighbours, compare_pixels, compare_without_held_out


def random_images(count, seed, size=6):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, size, size)).astype(np.float32)


TRAIN = random_images(300, 0)
INDICES = np.arange(300)


@pytest.mark.parametrize(("close", "total", "likely"), [(4, 100, False), (14, 100, False), (15, 100, True),
                                                        (2, 8, False), (5, 8, True)])  # fmt: skip
def test_copies_are_likely_where_chance_explains_fewer(close, total, likely):
    """From 15 % of many samples on; of 8 samples 2 are that close in one of 15 sets of new images."""
    samples = torch.tensor([0.0] * close + [1.0] * (total - close))
    found = compare_neighbours("pixels", 300, samples, torch.linspace(0.5, 2, 200))
    assert found.closer == pytest.approx(close / total)
    assert found.copies_are_likely == likely


def test_few_reference_images_are_no_proof():
    """The closest of 4 reference images is farther than each of many new images by chance in one of 5 cases."""
    samples = torch.tensor([0.0] * 2 + [1.0] * 8)
    assert not compare_neighbours("pixels", 4, samples, torch.tensor([0.5, 1, 1.5, 2])).copies_are_likely
    assert compare_neighbours("pixels", 4, torch.zeros(10), torch.tensor([0.5, 1, 1.5, 2])).copies_are_likely


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_left_out_training_images_are_as_good_a_reference_as_held_out_ones(share):
    samples = random_images(200, 2)
    copied = int(share * len(samples))
    samples[:copied] = TRAIN[:copied] + np.random.default_rng(3).normal(0, 0.02, TRAIN[:copied].shape)
    data = ArrayDataset(TRAIN)
    left_out = compare_without_held_out(torch.from_numpy(samples), data, INDICES)
    held_out = compare_pixels(torch.from_numpy(samples), torch.from_numpy(random_images(256, 1)), data, INDICES)
    assert left_out.comparison.copies_are_likely == held_out.comparison.copies_are_likely == (share > 0)
    assert left_out.comparison.closer == pytest.approx(held_out.comparison.closer, abs=0.05)
    assert left_out.comparison.held_out_median == pytest.approx(held_out.comparison.held_out_median, rel=0.02)
    assert torch.equal(left_out.indices, held_out.indices)
    assert left_out.indices[:copied].tolist() == list(range(copied))


def test_the_search_is_the_same_in_any_number_of_batches(monkeypatch):
    samples, reference, data = torch.from_numpy(random_images(20, 1)), torch.from_numpy(TRAIN[:50]), ArrayDataset(TRAIN)
    at_once = compare_pixels(samples, reference, data, INDICES, range(50))
    monkeypatch.setattr(memorization, "MAX_BATCH_VALUES", 36 * 7)
    in_batches = compare_pixels(samples, reference, data, INDICES, range(50))
    assert torch.equal(in_batches.distances, at_once.distances)
    assert torch.equal(in_batches.indices, at_once.indices)
    assert in_batches.comparison == at_once.comparison


def test_at_most_so_many_images_are_searched(monkeypatch):
    monkeypatch.setattr(memorization, "MAX_SEARCHED_IMAGES", 10)
    found = compare_without_held_out(torch.from_numpy(random_images(20, 1)), ArrayDataset(TRAIN), INDICES)
    assert found.comparison.searched == 10
    assert set(found.indices.tolist()) <= {int(i) for i in np.linspace(0, 299, 10)}


def test_images_that_cannot_be_decoded_are_left_out(tmp_path):
    for i, pixels in enumerate(random_images(20, 0, 8)):
        Image.fromarray(((pixels[0] + 1) * 127.5).astype(np.uint8)).save(tmp_path / f"{i:02d}.png")
    data = load_data(tmp_path, channels=1)
    sample = data[7]["image"][None]
    content = (tmp_path / "07.png").read_bytes()
    (tmp_path / "07.png").write_bytes(content[: len(content) // 2])
    found = compare_without_held_out(sample, data, np.arange(20))
    assert found.indices.item() != 7
    assert found.comparison.held_out_compared == 19
