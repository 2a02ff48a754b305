"""Runs that are broken on purpose, and perfect networks in closed form."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from unet_denoiser import Diffusion, TrainingConfig, UNet, UNetConfig, evaluate
from unet_denoiser.cli.app import main
from unet_denoiser.config.data import DataConfig
from unet_denoiser.data.load import load_data, with_found_values
from unet_denoiser.data.sources.arrays import ArrayDataset
from unet_denoiser.evaluation.doctor import diagnose
from unet_denoiser.evaluation.samples import GeneratedSamples
from unet_denoiser.training.loop import load_trainer, train
from unet_denoiser.training.run import Run

TINY = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (), "num_heads": 1}
TINY |= {"context_dim": None, "image_size": 4, "norm_groups": 2, "dropout": 0.0}


def flat_images(count, channels=1):
    """Return images of one colour each."""
    colours = np.random.default_rng(0).uniform(-1, 1, (count, channels, 1, 1))
    return np.broadcast_to(colours, (count, channels, 4, 4)).astype(np.float32)


def make_run(path, data, steps=1, process=None, **options):
    channels, classes = data.channels, data.class_names and len(data.class_names)
    config = UNetConfig(in_channels=channels, out_channels=channels, num_classes=classes, **TINY)
    options = {"batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 1, "ema_decay": 0.5, "device": "cpu"} | options
    training = TrainingConfig(steps=steps, preview_every=10**6, **options)
    process = process or Diffusion(prediction_type="epsilon", beta_schedule="linear")
    run = Run(path, with_found_values(DataConfig("x.npz"), data), config, process, training)
    trainer = load_trainer(run, data)
    run.write()
    for _ in train(run, trainer):
        pass
    return run


def run_doctor(run, data, **options):
    return diagnose(run, data, **{"num_images": 16, "num_samples": 8} | options)


def names(report):
    return [finding.name for finding in report.findings]


def make_ideal_network(network):
    """Return a UNet class that predicts the noise from x0 = `network(x_t, alpha, sigma)`, for `make_run`'s process."""
    process = Diffusion(prediction_type="epsilon", beta_schedule="linear")

    class Ideal(UNet):
        def forward(self, x, t, context=None, **conditions):
            shape = (-1, *[1] * (x.ndim - 1))
            alpha, sigma = process.alphas[t.long()].view(shape), process.sigmas[t.long()].view(shape)
            return (x - alpha * network(x, alpha, sigma)) / sigma

    return Ideal


def flat_image_mean(x, alpha, sigma):
    """Return the mean of flat images with a colour of N(0, 1/3), given x_t: a shrunken mean of the pixels."""
    mean = x.mean((2, 3), keepdim=True)
    return (alpha / 3 / (alpha**2 / 3 + sigma**2 / 16) * mean).expand_as(x)


def independent_pixel_mean(x, alpha, sigma):
    """Return the mean of images with pixels of N(0, 0.4^2), given x_t."""
    return alpha * 0.16 / (alpha**2 * 0.16 + sigma**2) * x


def memorized_mean(images):
    """Return the mean of a training set, given x_t: the output of a network that has learned it by heart."""

    def network(x, alpha, sigma):
        distances = (x[:, None] - alpha[:, None] * images).flatten(2).square().sum(2)
        weights = (-distances / (2 * sigma.view(-1, 1) ** 2)).softmax(1)
        return torch.einsum("bn,n...->b...", weights, images)

    return network


def with_network(run, monkeypatch, network):
    model = make_ideal_network(network).from_config(run.model).eval()
    monkeypatch.setattr(Run, "load_model", lambda self, checkpoint="latest": model)
    for path in run.checkpoints.paths():  # its raw weights are another network's
        path.unlink()


def test_the_best_network_has_nothing_wrong(tmp_path, monkeypatch):
    data = ArrayDataset(flat_images(200))
    run = make_run(tmp_path / "run", data)
    with_network(run, monkeypatch, flat_image_mean)
    report = run_doctor(run, data, num_images=200, num_samples=32)
    assert [f for f in report.findings if f.severity != "note"] == []
    assert report.text().startswith("Nothing wrong was found.")
    # closed form: the colour's variance 1/3 seen through 16 pixels of noise, as an error of the noise
    for level in report.measures.levels:
        alpha, sigma = run.process.alphas[level.t], run.process.sigmas[level.t]
        exact = (alpha / sigma) ** 2 * sigma**2 / 16 / 3 / (alpha**2 / 3 + sigma**2 / 16)
        assert level.error == pytest.approx(float(exact), rel=0.35)
        assert level.trivial == pytest.approx(float(alpha**2 / 3 / (alpha**2 / 3 + sigma**2)), rel=0.1)


def test_copies(tmp_path, monkeypatch):
    images = np.random.default_rng(0).uniform(-1, 1, (4, 1, 4, 4)).astype(np.float32)
    data = ArrayDataset(images)
    run = make_run(tmp_path / "run", data, batch_size=4)
    with_network(run, monkeypatch, memorized_mean(torch.from_numpy(images)))
    report = run_doctor(run, data)
    assert names(report)[0] == "copies"
    assert report.text().startswith("The samples are copies")
    assert report.measures.neighbours.ratio < 0.1
    assert (run.path / "doctor" / "neighbours.png").exists()


@pytest.mark.parametrize("copied", [True, False])
def test_doctor_and_evaluate_agree_on_copies(tmp_path, monkeypatch, copied):
    """A network that has learned its training images by heart, and one that makes new ones of their distribution."""
    images = np.random.default_rng(0).normal(0, 0.4, (200, 1, 4, 4)).clip(-1, 1).astype(np.float32)
    data = ArrayDataset(images)
    run = make_run(tmp_path / "run", data)
    with_network(run, monkeypatch, memorized_mean(torch.from_numpy(images)) if copied else independent_pixel_mean)
    diagnosis = run_doctor(run, data, num_samples=64)
    assert ("copies" in names(diagnosis)) == copied
    samples = GeneratedSamples(run, data, 64)
    (comparison,) = evaluate(samples, data, extractor="pixels", allow_few=True).neighbours
    assert comparison.copies_are_likely == diagnosis.measures.neighbours.copies_are_likely == copied


def test_grey_samples_are_not_called_copies_in_the_first_place(tmp_path, monkeypatch):
    """The mean image is nearer to all training images than they are to each other, but it copies none."""
    images = np.random.default_rng(0).uniform(-1, 1, (64, 1, 4, 4)).astype(np.float32)
    data = ArrayDataset(images)
    run = make_run(tmp_path / "run", data)
    with_network(run, monkeypatch, lambda x, alpha, sigma: torch.zeros_like(x))
    diagnosis = run_doctor(run, data)
    assert {f.name: f.severity for f in diagnosis.findings if f.is_symptom} == {"grey": "error", "copies": "note"}
    assert diagnosis.text().startswith("The samples are grey")


def test_images_of_several_sizes(tmp_path):
    """Samples are compared with the training images of their own size."""
    for i, (width, height) in enumerate([(8, 4), (4, 8)] * 6):
        pixels = np.random.default_rng(i).integers(0, 255, (height, width), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = load_data(tmp_path, image_size=(8, 8), channels=1, aspect_buckets=True)
    sizes = [len(bucket) for bucket in data.buckets]
    run = make_run(tmp_path / "run", data, batch_size=4)
    measures = run_doctor(run, data, num_samples=3).measures
    assert (len(sizes), measures.neighbours.searched) == (2, 6)


def test_too_few_steps(tmp_path):
    data = ArrayDataset(flat_images(64))
    report = run_doctor(make_run(tmp_path / "run", data), data)
    assert "undertrained" in names(report)
    assert "train longer (now step 1 of 1)" in report.text()


@pytest.mark.parametrize(
    ("scale", "offset", "options", "name", "words"),
    [
        (0.5, 0.5, {}, "data range", "in one half of the [-1, 1]"),
        (0.1, 0.0, {}, "data range", "of the [-1, 1] that the process expects"),
        (1.0, 0.0, {"clip_sample_range": 0.5}, "data range", "but the process expects [-0.5, 0.5]"),
        (0.1, 0.0, {"clip_sample_range": None}, "data scale", "standard deviation of 0.05"),
        (0.0, 0.3, {}, "constant data", "hardly differ"),
    ],
)
def test_data_in_a_wrong_range(tmp_path, scale, offset, options, name, words):
    data = ArrayDataset(flat_images(64) * scale + offset)
    run = make_run(tmp_path / "run", data, process=Diffusion(clip_sample_range=None))
    report = run_doctor(replace(run, process=Diffusion(**options)), data)
    assert name in names(report)
    assert words in report.text()


def test_a_schedule_that_ends_before_the_noise(tmp_path):
    data = ArrayDataset(flat_images(64))
    report = run_doctor(
        make_run(tmp_path / "run", data, process=Diffusion(num_train_timesteps=100, beta_schedule="linear")), data
    )
    assert next(f for f in report.findings if f.name == "schedule end").severity == "error"
    assert "the last timestep still has 60% of the image in it" in report.text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    data = ArrayDataset(flat_images(64))
    return make_run(tmp_path_factory.mktemp("runs") / "run", data, steps=60), data


def test_averages_that_are_still_the_start(trained):
    run, data = trained
    good = run_doctor(run, data)
    assert "averages too young" not in names(good)
    averages = run.path / "model" / "model.safetensors"
    kept = averages.read_bytes()
    torch.manual_seed(run.training.seed)
    UNet.from_config(run.model).save_pretrained(run.path / "model")
    report = run_doctor(run, data)
    averages.write_bytes(kept)
    assert report.findings[0].name in ("averages too young", "undertrained")
    assert "averages too young" in names(report)
    assert report.measures.ema.averaged_over_raw > 1.1 > good.measures.ema.averaged_over_raw
    assert "a lower ema_decay than 0.5" in report.text()


def test_a_young_training_is_the_first_reason(tmp_path):
    """Samples of a training that was stopped early are blots, whatever else can be seen in them."""
    data = ArrayDataset(flat_images(64))
    run = make_run(tmp_path / "run", data, steps=3)
    young = replace(run, training=replace(run.training, steps=20_000))
    text = run_doctor(young, data).text()
    assert text.startswith("At step 3 of 20,000 training has hardly begun (the network's error is ")
    assert "so its samples are blots or noise as yet. Go on with: unet-denoiser train --resume" in text.splitlines()[0]
    assert "young training" not in names(run_doctor(run, data))  # as long as planned
    bad = replace(young, process=Diffusion(clip_sample_range=0.1))  # a mistake comes before any number of steps
    assert run_doctor(bad, data).findings[0].name == "data range"


def test_a_loss_that_still_falls_needs_more_steps(trained):
    run, data = trained
    metrics = run.path / "metrics.jsonl"
    kept = metrics.read_text()
    metrics.write_text("\n".join(json.dumps({"step": i, "loss": 0.99**i}) for i in range(40)))
    report = run_doctor(run, data)
    metrics.write_text(kept)
    assert "still learning" in names(report)
    assert f"train longer: unet-denoiser train --resume {run.path} --steps 120" in report.text()


def test_the_loss_curve(trained):
    run, data = trained
    metrics = run.path / "metrics.jsonl"
    kept = metrics.read_text()
    found = {}
    for name, losses in (("flat", [1.0] * 40), ("rising", [*[1.0] * 30, *[1.5] * 10]), ("bad", [None, 1.0])):
        lines = [json.dumps({"step": i, "loss": loss}) for i, loss in enumerate(losses)]
        metrics.write_text("\n".join([*lines, '{"step": 9, "lo']))
        found[name] = names(run_doctor(run, data))
    metrics.write_text(kept)
    assert ["plateau" in found["flat"], "rising loss" in found["rising"], "bad steps" in found["bad"]] == [True] * 3
    assert "plateau" not in found["rising"]


@pytest.mark.parametrize(("channels", "classes"), [(1, 2), (3, None), (5, 3)])
def test_channels_and_classes(tmp_path, channels, classes):
    labels = None if classes is None else np.arange(40) % classes
    data = ArrayDataset(flat_images(40, channels), labels)
    run = make_run(tmp_path / "run", data)
    report = run_doctor(run, data)
    suffix = ".npy" if channels == 5 else ".png"
    assert [p.name for p in report.pictures] == [f"denoising{suffix}", f"neighbours{suffix}"]
    assert all(p.exists() for p in report.pictures)
    written = json.loads((run.path / "doctor" / "report.json").read_text())
    assert written["measures"]["data"]["shape"] == [40, channels, 4, 4]
    assert [f["name"] for f in written["findings"]] == names(report)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", ArrayDataset(flat_images(20)))
    np.savez("moved.npz", images=np.moveaxis(flat_images(20), 1, -1))
    main(["doctor", "run", "--data", "moved.npz", "--num-images", "4", "--num-samples", "2"])
    text = capsys.readouterr().out
    assert "noise level" in text
    assert str(run.path.name) + "/doctor/denoising.png" in text
    for args, message in (
        (["nowhere"], "nowhere holds no run"),
        (["run"], "x.npz"),
        (["run", "--data", "moved.npz", "--num-samples", "1"], "num_samples=1 must be at least 2"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["doctor", *args])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
