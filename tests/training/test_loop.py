"""The training of a run: its files, previews and saves that leave training alone, exact resuming."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from support.trainings import assert_equal, make_run, make_trainer, steps_kept, weights, without_times
from unet_denoiser import ArrayDataset, DataConfig, Run, UNet, UNetConfig
from unet_denoiser.training.loop import check_new, load_trainer, preview, preview_captions, save, train
from unet_denoiser.training.tracking import MetricsLog


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_a_training_fills_the_run_directory(run):
    trainer = load_trainer(run)
    assert [step.step for step in train(run, trainer)] == list(range(1, 26))
    files = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file() and "checkpoints" not in p.parts}
    assert files == {
        ".lock",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "model/class_names.json",
        "model/config.json",
        "model/model.safetensors",
        "model/scheduler_config.json",
        "samples/step-00000020.png",
        "samples/step-00000025.png",
    }
    assert steps_kept(run) == [20, 25]  # the latest two
    again = Run.load(run.path)
    assert (again.data, again.model) == (run.data, run.model)
    assert again.training == replace(run.training, mixed_precision="no")  # what the device computes in
    assert again.process.to_dict() == run.process.to_dict()
    assert again.data.class_names == ("low", "high")
    assert json.loads((run.path / "model" / "class_names.json").read_text()) == ["low", "high"]
    with trainer.ema.swapped():  # model/ has the averages
        assert_equal(weights(UNet.from_pretrained(run.path / "model")), weights(trainer.model))
    logged = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [10, 20, 25]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged)


def test_previews_and_saves_do_not_change_training(tmp_path):
    plain = make_trainer()
    list(plain.steps())
    watched = make_trainer()
    data = DataConfig("two", class_names=("low", "high"))
    run = Run(tmp_path, data, watched.model.config, watched.process, watched.config)
    for _ in watched.steps():
        before = weights(watched.model)
        preview(run, watched)
        save(run, watched, MetricsLog(tmp_path / "metrics.jsonl", 1000))
        assert_equal(weights(watched.model), before)
    assert_equal(weights(watched.model), weights(plain.model))
    assert_equal(watched.ema.state_dict()["averages"], plain.ema.state_dict()["averages"])


def test_an_interrupted_run_resumes_bit_for_bit(run, tmp_path):
    straight = load_trainer(run)
    list(train(run, straight))
    expected, metrics = weights(straight.model), (run.path / "metrics.jsonl").read_text()
    other = Run(tmp_path / "other", run.data, run.model, run.process, run.training)
    other.write()
    for step in train(other, load_trainer(other)):
        if step.step == 17:  # a checkpoint at 10, metrics up to 10, then lost
            break
    resumed = Run.load(other.path)
    trainer = load_trainer(resumed)
    assert trainer.step == 10
    list(train(resumed, trainer))
    assert_equal(weights(trainer.model), expected)
    assert without_times((other.path / "metrics.jsonl").read_text()) == without_times(metrics)


def test_a_failed_save_leaves_the_last_checkpoint(run, monkeypatch):
    trainer = load_trainer(run)
    steps = train(run, trainer)
    while next(steps).step < 10:
        pass
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}

    def fail(tensors, path, metadata):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save(run, trainer, MetricsLog(run.path / "metrics.jsonl", 1000))
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    assert load_trainer(run).step == 10


def test_a_directory_with_a_run_is_refused(run):
    with pytest.raises(FileExistsError, match="already holds a run, which unet-denoiser train --resume"):
        check_new(run.path)


def test_previews_of_captions_have_them_at_their_rows():
    data = ArrayDataset(np.zeros((40, 1, 8, 8), np.uint8), captions=[f"caption {i}" for i in range(40)])
    captions = preview_captions(UNetConfig(context_dim=8), data)
    assert (len(captions), captions[0], captions[-1]) == (16, "caption 0", "caption 39")
    assert preview_captions(UNetConfig(context_dim=None), data) is None  # not learned
