"""Whole evaluations: copies are told from new images, features are cached, unusable input is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser import ArrayDataset, evaluate
from unet_denoiser.data.load import load_data
from unet_denoiser.data.sources.arrays import digits
from unet_denoiser.evaluation import feature_extractors
from unet_denoiser.evaluation.metrics import frechet_distance, kernel_distance


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))


def random_images(count, seed, size=6):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 1, size, size)).astype(np.float32)


TRAIN, HELD_OUT, NEW = random_images(300, 0), random_images(200, 1), random_images(200, 2)
OPTIONS = {"held_out": HELD_OUT, "extractor": "pixels", "allow_few": True}


def test_figures_are_those_of_the_features():
    report = evaluate(NEW, TRAIN, **OPTIONS)
    new, train = (torch.from_numpy(x).flatten(1) for x in (NEW, TRAIN))
    assert report.samples.frechet == pytest.approx(frechet_distance(new, train), rel=1e-6)
    assert report.samples.kernel == pytest.approx(kernel_distance(new, train), rel=1e-6, abs=1e-9)
    assert (report.samples.images, report.samples.reference, report.samples.overlap_count) == (200, 300, 200)
    assert (report.held_out.images, report.samples_at_held_out_count, report.accuracy) == (200, None, None)


def test_new_images_are_no_copies():
    (found,) = evaluate(NEW, TRAIN, **OPTIONS).neighbours
    assert not found.copies_are_likely
    assert found.closer < 0.12
    assert found.median == pytest.approx(found.held_out_median, rel=0.03)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_copies_of_training_images_are_found(share):
    samples = NEW.copy()
    copied = int(share * len(samples))
    samples[:copied] = TRAIN[:copied] + np.random.default_rng(3).normal(0, 0.02, TRAIN[:copied].shape)
    report = evaluate(samples, TRAIN, **OPTIONS)
    (found,) = report.neighbours
    assert found.copies_are_likely
    assert found.closer == pytest.approx(share + 0.05 * (1 - share), abs=0.05)
    assert "COPIES ARE LIKELY" in report.text()


def test_copies_are_found_where_the_data_have_duplicates():
    """Some held-out images lie in the training set too, so that no distance could be smaller than theirs."""
    held_out = np.concatenate([TRAIN[:40], HELD_OUT[:160]])
    options = OPTIONS | {"held_out": held_out}
    (copied,), (new,) = (evaluate(x, TRAIN, **options).neighbours for x in (TRAIN[100:300], held_out))
    assert copied.closer == pytest.approx(0.25)  # of the fifth at no distance, a quarter is within the 5 %
    assert copied.copies_are_likely
    assert new.closer == pytest.approx(0.05)


def test_the_picture_shows_the_closest_pairs(tmp_path):
    samples = NEW.copy()
    samples[100] = TRAIN[33]
    evaluate(samples, TRAIN, folder=tmp_path, **OPTIONS)
    with Image.open(tmp_path / "neighbours.png") as image:
        shown = np.array(image)
    first, below = (shown[top : top + 36, 2:38] for top in (2, 40))
    expected = np.kron(np.round((TRAIN[33, 0] + 1) * 127.5), np.ones((6, 6)))
    assert (np.abs(first - expected).max(), np.abs(below - expected).max()) == (0, 0)


def test_without_held_out_images_half_of_the_data_are_the_floor():
    report = evaluate(NEW, TRAIN, extractor="pixels", allow_few=True)
    assert (report.held_out.images, report.samples.reference, report.samples.images) == (150, 150, 200)
    assert report.samples_at_held_out_count.images == 150
    assert "no held-out images given" in report.text()
    (found,) = report.neighbours
    assert found.searched == 150
    assert found.held_out_median > 0.1  # not with themselves


def test_written_report_says_everything(tmp_path):
    report = evaluate(NEW, TRAIN, folder=tmp_path, about={"run": "runs/x"}, **OPTIONS)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["about"]["samples"] == {"count": 200, "run": "runs/x"}
    assert written["about"]["extractor"]["name"] == "pixels"
    assert written["about"]["versions"]["torch"] == torch.__version__
    assert written["samples"]["kernel"]["value"] == report.samples.kernel.value
    assert (tmp_path / "neighbours.png").is_file()
    text = report.text()
    for needed in ("200 samples against 300 of the 300 images", "36 features of pixels", "Frechet distance (pixels)"):
        assert needed in text
    assert "FID" not in text


def test_features_of_data_are_cached(tmp_path, monkeypatch):
    np.savez(tmp_path / "d.npz", images=np.random.default_rng(0).integers(0, 255, (40, 6, 6), np.uint8))
    options = {"allow_few": True, "extractor": "pixels"}

    def run(**more):
        return evaluate(NEW, load_data(tmp_path / "d.npz"), **options | more)

    first = run()
    monkeypatch.setattr(feature_extractors, "image_batches", None)  # computing any would fail
    again = run()
    assert (again.samples, again.held_out) == (first.samples, first.held_out)
    with pytest.raises(TypeError):
        run(num_data=30)  # others
    np.savez(tmp_path / "d.npz", images=np.zeros((40, 6, 6), np.uint8))
    with pytest.raises(TypeError):
        run()  # the file has changed


def test_class_accuracy():
    (seen, labels), (unseen, unseen_labels) = digits(), digits(held_out=True)
    data, held_out = ArrayDataset(seen, labels), ArrayDataset(unseen, unseen_labels)
    options = {"held_out": held_out, "extractor": "pixels", "allow_few": True}
    right = evaluate(unseen, data, labels=torch.from_numpy(unseen_labels), **options)
    assert right.accuracy.samples == right.accuracy.held_out > 0.9
    assert f"{right.accuracy.held_out:.1%}" in right.text()
    wrong = evaluate(unseen, data, labels=torch.from_numpy((unseen_labels + 1) % 10), **options)
    assert wrong.accuracy.samples < 0.1


def test_refusals():
    with pytest.raises(ValueError, match=r"num_samples=200 is fewer than 2,000.*bias.*allow_few"):
        evaluate(NEW, TRAIN, held_out=HELD_OUT, extractor="pixels")
    with pytest.raises(ValueError, match="num_samples=5 must be at least 6"):
        evaluate(NEW[:5], TRAIN, held_out=HELD_OUT, extractor="pixels", allow_few=True)
    with pytest.raises(ValueError, match=r"samples has images of shape \(1, 5, 5\), the data \(1, 6, 6\)"):
        evaluate(random_images(9, 0, 5), TRAIN, **OPTIONS)
    with pytest.raises(ValueError, match=r"held_out has images of shape \(1, 5, 5\)"):
        evaluate(NEW, TRAIN, **OPTIONS | {"held_out": random_images(9, 0, 5)})
    with pytest.raises(TypeError, match="data is a list_iterator, which can be read only once"):
        evaluate(NEW, iter([{"image": torch.zeros(1, 6, 6)}] * 2), **OPTIONS)
    data = ArrayDataset(TRAIN, np.arange(300) % 2)
    with pytest.raises(ValueError, match="labels has 3 entries for 200 samples"):
        evaluate(NEW, data, labels=torch.zeros(3), extractor="pixels", allow_few=True)
    with pytest.raises(ValueError, match=r"images of the arrays go from 0 to 255; floats must be in \[-1, 1\]"):
        evaluate(np.arange(512, dtype=np.float32).reshape(8, 1, 8, 8) % 256, TRAIN, **OPTIONS)
    with pytest.raises(ValueError, match="samples are not finite"):
        evaluate(BadSamples(), TRAIN, **OPTIONS)


class BadSamples:
    def __len__(self):
        return 8

    def __iter__(self):
        yield torch.full((8, 1, 6, 6), torch.nan)
