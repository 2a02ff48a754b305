"""The distill command as a user runs it: a run from a run, resumed, sampled in its steps, and refused otherwise."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from support.commands import TINY, error
from unet_denoiser import Run, UNet
from unet_denoiser.cli.app import main
from unet_denoiser.training.loop import load_trainer


def student(**changes):
    """Return the options of a small student, with some changed."""
    options = {"num-steps": "2", "guidance-scale": "2", "teacher-steps": "4", "steps": "3", "out": "student"} | changes
    return [word for name, value in options.items() for word in (f"--{name}", *value.split())]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    main(["train", "digits", "--out", str(folder / "teacher"), *TINY])
    return folder / "teacher"


@pytest.fixture
def teacher(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "teacher")
    return "teacher"


def test_distils_a_run_into_one_that_samples_in_its_steps(teacher, capsys):
    main(["distill", teacher, *student()])
    assert "distillation: into 2 steps of ddim with guidance of 2 built in" in capsys.readouterr().out
    run = Run.load("student")
    assert (run.process.distillation.num_steps, run.training.steps, run.training.batch_size) == (2, 3, 4)
    assert run.training.condition_dropout == 0
    assert run.model == Run.load(teacher).model
    start, end = UNet.from_pretrained("student/init"), run.load_model()
    assert all(
        torch.equal(p, q) for p, q in zip(start.parameters(), Run.load(teacher).load_model().parameters(), strict=True)
    )
    assert not torch.equal(start.input_conv.weight, end.input_conv.weight)
    assert list((run.path / "samples").glob("*.png"))
    main(["sample", "student", "--num-images", "10", "--strip"])
    with Image.open("student/samples-strip.png") as strip:
        assert strip.height > 0
    assert "num_inference_steps=3: this network was distilled" in error(
        capsys, "sample", "student", "--num-inference-steps", "3"
    )
    assert "guidance_scale=3.0: this network" in error(capsys, "sample", "student", "--guidance-scale", "3")
    assert "student was distilled, which" in error(capsys, "distill", "student", "--out", "again")
    assert "student was distilled, which" in error(capsys, "train", "digits", "--init", "student", "--out", "again")
    assert "its losses mean nothing" in error(capsys, "doctor", "student")


@pytest.mark.parametrize("path", ["flow", "edm"])
def test_distils_a_run_of_each_path(capsys, path):
    main(["train", "digits", "--out", "other", "--process.path", path, *TINY])
    main(["distill", "other", *student()])
    assert Run.load("student").process.path == path
    main(["sample", "student", "--num-images", "10", "--out", "ten.png"])
    with Image.open("ten.png") as grid:
        assert grid.getextrema()[0] != grid.getextrema()[1]
    message = error(capsys, "sample", "student", "--num-inference-steps", "3")
    assert "num_inference_steps=3: this network was distilled for 2 steps" in message


def test_resumes_bit_for_bit(teacher):
    main(["distill", teacher, *student(steps="5")])
    straight = Run.load("student").load_model()
    shutil.move("student", "straight")
    main(["distill", teacher, *student(steps="5"), "--checkpoint-every", "2", "--keep-last", "9"])
    shutil.rmtree(teacher)  # the run holds its teacher
    for step in (4, 5):
        (Run.load("student").checkpoints.folder / f"step-{step:08d}.safetensors").unlink()
    shutil.rmtree("student/model")
    assert load_trainer(Run.load("student")).step == 2
    main(["train", "--resume", "student"])
    for name, weights in Run.load("student").load_model().state_dict().items():
        assert torch.equal(weights, straight.state_dict()[name])


def test_guidance_in_a_range(teacher, capsys):
    main(["distill", teacher, *student(**{"guidance-scale": "1 4"})])
    assert Run.load("student").model.time_cond_dim == 256
    for scale in ("1", "4"):
        main(["sample", "student", "--num-images", "2", "--guidance-scale", scale, "--out", f"{scale}.png"])
    pixels = [np.array(Image.open(f"{scale}.png")) for scale in ("1", "4")]
    assert pixels[0].shape == pixels[1].shape
    message = error(capsys, "sample", "student", "--guidance-scale", "5")
    assert "guidance_scale=5.0: this network was distilled for 1 to 4" in message


def test_a_lora_is_distilled_and_merged(teacher):
    pytest.importorskip("peft")
    main(["distill", teacher, *student(), "--lora-rank", "2"])
    run = Run.load("student")
    assert (run.path / "lora.safetensors").is_file()
    start, end = UNet.from_pretrained("student/init"), run.load_model()
    changed = [name for name, p in end.state_dict().items() if not torch.equal(p, start.state_dict()[name])]
    assert changed
    assert all("attn" in name or "to_" in name for name in changed)
    main(["sample", "student", "--num-images", "2"])


def test_a_model_directory_needs_data(teacher, capsys):
    model = f"{teacher}/model"
    assert "is no run, whose data would be known; give --data DATA" in error(capsys, "distill", model, *student())
    main(["distill", model, "--data", "digits", *student(), "--batch-size", "4", "--device", "cpu"])
    assert Run.load("student").process.distillation.num_steps == 2


def test_evaluates_in_its_own_steps(teacher, capsys):
    main(["distill", teacher, *student()])
    args = "--num-samples 16 --num-data 64 --allow-few --extractor pixels --batch-size 16 --device cpu"
    main(["evaluate", "student", *args.split()])
    report = json.loads(next(iter(Run.load("student").path.glob("evaluation/report.json"))).read_text())
    assert '"num_inference_steps": 2' in json.dumps(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num-steps": "0"}, "num_steps=0 must be at least 1"),
        ({"teacher-steps": "3"}, "teacher_steps=3 must be a multiple of num_steps=2"),
        ({"process.beta-schedule": "linear"}, "process.beta_schedule: teacher has its process; leave it out"),
        ({"guidance-scale": "1 4", "lora-rank": "2"}, "a LoRA would leave time_cond.weight (not there)"),
        (
            {"condition-dropout": "0.5"},
            "a distilled network is never without its conditions; give 0.0",
        ),
    ],
)
def test_refuses_options(teacher, capsys, options, message):
    assert message in error(capsys, "distill", teacher, *student(**options))
