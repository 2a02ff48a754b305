"""Records of a training: means, their state, the plot, and what TensorBoard reads back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from support.trainings import make_trainer
from unet_denoiser import DataConfig, Run
from unet_denoiser.diffusion.loss import Losses
from unet_denoiser.training.loop import train
from unet_denoiser.training.tracking import MetricsLog, plot
from unet_denoiser.training.trainer import TrainingStep


def step(number, loss, t, skipped=False):
    losses = Losses(torch.tensor(loss), torch.tensor(loss), torch.tensor(t))
    return TrainingStep(number, losses.loss.mean(), torch.tensor(2.0 * number), 0.1, losses, skipped, False)


STEPS = [
    step(1, [1.0, 3.0], [0, 999]),
    step(2, [float("nan"), 1.0], [3, 5], skipped=True),
    step(3, [2.0, 5.0], [1, 998]),
]


def test_lines_are_means_without_the_skipped_steps(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 1000)
    for one in STEPS:
        metrics.add(one)
    metrics.write(STEPS[-1], skipped_steps=1, data_wait=0.25)
    (line,) = metrics.read()
    assert (line["step"], line["loss"], line["grad_norm"], line["skipped_steps"]) == (3, 2.75, 4.0, 1)
    assert line["loss_per_level"] == [1.5, *[None] * 6, 4.0]
    assert line["data_wait"] == 0.25
    assert metrics.state()["smoothed_loss"] == pytest.approx((2 * 0.999 + 3.5) / 1.999)


def test_state_restores_in_the_middle_of_a_line(tmp_path):
    straight, first, second = (MetricsLog(tmp_path / name, 1000) for name in ("straight", "first", "second"))
    for one in STEPS:
        straight.add(one)
    first.add(STEPS[0])
    second.restore(json.loads(json.dumps(first.state())))
    for one in STEPS[1:]:
        second.add(one)
    lines = [metrics.write(STEPS[-1], 1, 0.25) for metrics in (straight, second)]
    assert lines[0] == lines[1]
    assert straight.state() == second.state()


def test_lines_after_a_checkpoint_and_half_lines_are_cut(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 1000)
    metrics.path.write_text('{"step": 10}\n{"step": 20}\n{"step": 3')
    metrics.cut(10)
    assert metrics.path.read_text() == '{"step": 10}\n'


@pytest.mark.parametrize(
    "bad",
    [b"garbage", b"[1]", b'{"step": "5"}', b'{"loss": 1}', b"\xff\0", b"", b"null", b'{"step": 1e3}', b"[" * 9999],
)
def test_damaged_lines_are_dropped_with_a_word(tmp_path, bad):
    metrics = MetricsLog(tmp_path / "metrics.jsonl", 1000)
    metrics.path.write_bytes(b'{"step": 10, "loss": 1}\n' + bad + b'\n{"step": 20}\n' + bad)
    assert [line["step"] for line in metrics.read()] == [10, 20]
    with pytest.warns(UserWarning, match=r"metrics.jsonl: 1 damaged lines are dropped"):
        metrics.cut(20)
    assert metrics.path.read_text() == '{"step": 10, "loss": 1}\n{"step": 20}\n'
    plot(metrics.read(), tmp_path / "loss.png")


@pytest.mark.parametrize("value", [None, "x", [1], {}, float("nan"), True, 10**309])
def test_lines_of_other_shapes_are_plotted(tmp_path, value):
    lines = [{"step": 1, "loss": value, "grad_norm": value, "loss_per_level": value}, {"step": 2}]
    plot([*lines, {"step": 3, "loss_per_level": [value, 1.0]}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_the_plot_shows_the_lines(tmp_path):
    line = {"step": 10, "loss": 1.0, "grad_norm": 2.0, "loss_per_level": [1.0, None, 3.0]}
    pictures = []
    for lines in ([], [line], [line | {"step": 10 * i, "loss": 1 / i} for i in range(1, 30)]):
        plot(lines, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as image:
            pictures.append(np.asarray(image.convert("RGB")))
    assert pictures[0].shape == pictures[2].shape == (400, 1200, 3)
    assert (pictures[0] != pictures[2]).any()


def test_tensorboard_gets_every_line(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer({"track": "tensorboard", "steps": 12, "preview_every": 100})
    run = Run(tmp_path, DataConfig("two"), trainer.model.config, trainer.process, trainer.config)
    list(train(run, trainer))
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in logged]
    assert "loss_per_level/7" in events.Tags()["scalars"]
