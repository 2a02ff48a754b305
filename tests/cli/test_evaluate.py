"""The evaluate command: on a tiny run of the digits, on samples of files, and one line for every mistake."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from support.networks import SMALL
from unet_denoiser import ArrayDataset, Diffusion, Run, TrainingConfig, UNetConfig, load_trainer, train
from unet_denoiser.cli.app import main
from unet_denoiser.config.data import DataConfig
from unet_denoiser.config.sampling import SamplingConfig
from unet_denoiser.data.load import load_data, with_found_values
from unet_denoiser.data.sources.arrays import digits
from unet_denoiser.evaluation.samples import GeneratedSamples, proportional_labels, round_down

FAST = "--num-samples 40 --allow-few --num-inference-steps 2 --extractor pixels --device cpu".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def make_run(path, data, source, **model):
    """A run of one step, whose network is of no use but samples."""
    config = UNetConfig(**SMALL | {"in_channels": data.channels, "out_channels": data.channels} | model)
    training = TrainingConfig(steps=1, batch_size=4, preview_every=10**6, device="cpu")
    run = Run(path, with_found_values(DataConfig(source), data), config, Diffusion(), training)
    trainer = load_trainer(run, data)
    run.write()
    for _ in train(run, trainer):
        pass
    return run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", load_data("digits"), "digits", num_classes=10)


def error(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", *map(str, args)])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("unet-denoiser: error: ")
    assert said.count("\n") == 1
    return said


def test_evaluates_a_run(run, capsys):
    main(["evaluate", str(run.path), "--held-out", "digits:held-out", "--num-data", "200", *FAST])
    printed = capsys.readouterr().out
    report = json.loads((run.path / "evaluation" / "report.json").read_text())
    assert "40 samples against 200 of the 1,438 images of digits; held out: 359 images of digits:held-out" in printed
    assert printed.splitlines()[-1] == str(run.path / "evaluation" / "report.json")
    about = report["about"]["samples"]
    assert (about["step"], about["seed"], about["sampling"]["num_inference_steps"]) == (1, 0, 2)
    assert report["held_out"]["images"] == 40
    assert report["accuracy"]["samples"] < 0.5 < report["accuracy"]["held_out"]
    assert report["samples"]["frechet"] > 3 * report["held_out"]["frechet"]  # the network has learned nothing
    assert report["samples"]["kernel"]["value"] > report["held_out"]["kernel"]["value"]
    with Image.open(run.path / "evaluation" / "neighbours.png") as image:
        assert image.size == (16 * 34 + 2, 2 * 34 + 2)
    main(["evaluate", str(run.path), "--held-out", "digits:held-out", "--num-data", "200", *FAST])
    again = json.loads((run.path / "evaluation" / "report.json").read_text())
    assert again == report


def test_default_counts_suit_a_cpu(run, capsys, monkeypatch):
    monkeypatch.setattr("unet_denoiser.cli.evaluate.CPU_SECONDS", 1e-6)
    main(["evaluate", str(run.path), "--num-inference-steps", "2", "--extractor", "pixels", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"evaluating {run.path} ..."
    assert lines[1].startswith("64 samples, about two minutes' work here (--num-samples changes it); fewer than 2,000")
    assert lines[2] == "features of 500 of 1,438 images; --num-data changes it"
    assert "64 samples against 250 of the 1,438 images" in lines[3]
    report = json.loads((run.path / "evaluation" / "report.json").read_text())
    assert (report["samples"]["images"], report["held_out"]["images"]) == (64, 64)


@pytest.mark.parametrize(("count", "least", "rounded"), [(219.9, 64, 210), (3, 64, 64), (1e9, 64, 10_000)])
def test_chosen_counts_are_round(count, least, rounded):
    assert round_down(count, least) == rounded


def test_samples_depend_on_their_seeds_alone(run):
    data, config = load_data("digits"), SamplingConfig(num_inference_steps=2)
    few, many = (GeneratedSamples(run, data, 9, seed=5, batch_size=size, config=config) for size in (2, 9))
    torch.testing.assert_close(torch.cat(list(few)), torch.cat(list(many)), rtol=1e-4, atol=1e-4)
    assert few.labels.tolist() == many.labels.tolist()


def test_conditions_of_a_run_come_from_the_data(tmp_path):
    images, labels = digits()
    vectors = np.stack([labels, labels * 2, labels * 3], 1)
    data = ArrayDataset(images[:50], labels[:50] % 5, vectors=vectors[:50] % 5)
    run = make_run(tmp_path / "run", data, "x.npz", num_classes=5, vector_dim=3)
    made = GeneratedSamples(run, data, 70, config=SamplingConfig(num_inference_steps=1))
    given = [made.conditions(start, start + 35) for start in (0, 35)]
    found_labels, vectors = (torch.cat([getattr(each, name) for each in given]) for name in ("class_labels", "vector"))
    assert found_labels.tolist() == made.labels.tolist()
    assert vectors[:, 0].tolist() == found_labels.tolist()  # of one item each
    assert torch.cat(list(made)).shape == (70, 1, 8, 8)
    with pytest.raises(ValueError, match="conditioned on vector, which the data do not have"):
        GeneratedSamples(run, load_data("digits"), 9)


def test_labelsproportional_labels():
    labels = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    for count in (10, 100, 1000):
        found = proportional_labels(labels, count, seed=0)
        assert (found.bincount() - count * torch.tensor([0.7, 0.2, 0.1])).abs().max() <= 1
    assert found[:100].unique().tolist() == [0, 1, 2]


def test_samples_of_files_without_a_run(tmp_path, capsys):
    images, labels = digits(held_out=True)
    pixels = ((images[:, 0] + 1) * 127.5).round().astype(np.uint8)
    np.savez("peer.npz", images=pixels[:60], labels=labels[:60])
    for image, label, i in zip(pixels[:60], labels, range(60), strict=False):
        (tmp_path / "peer" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "peer" / str(label) / f"{i}.png")
    (tmp_path / "parts").mkdir()
    for name, part in (("000000-000044", slice(45)), ("000045-000059", slice(45, 60))):
        np.savez(tmp_path / "parts" / f"{name}.npz", images=pixels[part], labels=labels[part])
    (tmp_path / "parts" / "settings.json").write_text('{"num_images": 60}')
    reports = []
    for samples in ("peer.npz", "parts", "peer"):
        main(["evaluate", "--samples", samples, "--data", "digits", *["--extractor", "pixels", "--allow-few"]])
        assert "samples against 719 of the 1,438 images" in capsys.readouterr().out
        folder = tmp_path / f"{samples.removesuffix('.npz')}-evaluation"
        reports.append(json.loads((folder / "report.json").read_text()))
    for report in reports[1:]:
        assert report["samples"]["frechet"] == pytest.approx(reports[0]["samples"]["frechet"])
        assert report["accuracy"] == reports[0]["accuracy"]
    assert reports[0]["accuracy"]["samples"] > 0.8
    assert reports[0]["about"]["samples"]["source"] == "peer.npz"
    (tmp_path / "parts" / "000045-000059.npz").unlink()
    assert "parts has 45 of its 60 samples" in error(capsys, "--samples", "parts", "--data", "digits", "--allow-few")


def test_mistakes(run, capsys, monkeypatch):
    assert "give a RUN; or --samples and --data" in error(capsys, "--data", "digits")
    assert "num_samples=40 is fewer than 2,000" in error(capsys, run.path, *FAST[:2], "--extractor", "pixels")
    assert "num_inference_steps means nothing with --samples" in error(
        capsys, run.path, "--samples", "x.npz", "--num-inference-steps", 3
    )
    for name, value in (("seed", 0), ("batch-size", 64), ("checkpoint", "latest")):
        message = error(capsys, run.path, "--samples", "x.npz", f"--{name}", value)
        assert f"{name.replace('-', '_')} means nothing with --samples" in message
    assert "no file can be made in it" in error(capsys, run.path, *FAST, "--out", run.path / "config.json" / "new")
    assert "extractor='vgg' is neither one of auto, inception" in error(
        capsys, run.path, *FAST[:5], "--extractor", "vgg"
    )
    assert "num_data=-1 must be at least 0" in error(capsys, run.path, "--num-data", -1)
    assert "holds no run" in error(capsys, "nowhere", *FAST)
    assert "DATA=gone" in error(capsys, run.path, "--held-out", "gone", *FAST)
    assert "num_inference_steps=2000 must be 1 to 1000" in error(capsys, run.path, *FAST, "--num-inference-steps", 2000)
    np.savez("big.npz", images=np.zeros((5, 12, 12), np.uint8))
    assert "samples=big.npz are of size (12, 12), the data of (8, 8)" in error(
        capsys, run.path, "--samples", "big.npz", "--allow-few"
    )
    np.savez("plain.npz", images=np.zeros((50, 8, 8), np.uint8))
    assert "conditioned on class_labels, which the data do not have" in error(
        capsys, run.path, "--data", "plain.npz", *FAST
    )


def test_guidance_without_conditions_is_refused_before_any_work(tmp_path, capsys):
    data = ArrayDataset(digits()[0][:20])
    run = make_run(tmp_path / "run", data, "digits")
    assert "guidance_scale=3.0 needs conditions" in error(capsys, run.path, *FAST, "--guidance-scale", 3)
