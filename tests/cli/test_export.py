"""The export command and `sample --backend` as a user runs them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import TINY, error
from support.exports import run_readme
from unet_denoiser import Diffusion, UNet
from unet_denoiser.cli.app import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    main(["train", "digits", "--out", str(folder / "run"), *TINY])
    return folder / "run"


@pytest.fixture
def run(trained, here):
    shutil.copytree(trained, here / "run")
    return "run"


def test_exports_a_run_whose_readme_samples_digits(run, capsys):
    main(f"export {run} out --to onnx --image-size 8 --batch-size 2".split())
    said = capsys.readouterr().out
    assert said.startswith("out: onnx, float32; error ")
    assert said.count("\n") == 1
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "README.md",
        "example.npz",
        "network.onnx",
        "schedule.json",
    ]
    run_readme(Path("out"))
    samples = np.load("out/samples.npy")
    assert samples.shape == (2, 1, 8, 8)
    assert np.abs(samples).max() <= 1


def test_samples_in_openvino_are_torchs(run):
    command = f"sample {run} --num-images 3 --num-inference-steps 4 --guidance-scale 2 --device cpu".split()
    for name in ("torch", "openvino"):
        main([*command, "--backend", name, "--out", f"{name}.png"])
    first, second = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("torch", "openvino"))
    assert np.abs(first - second).max() <= 1
    assert first.std() > 5


def test_exports_a_saved_model(here):
    model = UNet(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_dim=None, norm_groups=4)
    model.save_pretrained("model")
    Diffusion().save_pretrained("model")
    main(["export", "model", "out", "--to", "torch", "--image-size", "8", "--batch-size", "1"])
    run_readme(Path("out"))
    assert np.load("out/samples.npy").shape == (1, 3, 8, 8)


def test_mistakes_are_one_line_and_leave_nothing(run, here, capsys):
    before = sorted(p.name for p in here.iterdir())
    assert "holds no run" in error(capsys, "export", "nothing", "out")
    assert "run exists; give a new name" in error(capsys, "export", run, "run")
    assert "give float32 or float16" in error(capsys, "export", run, "out", "--precision", "bfloat16")
    assert "image_size" in error(capsys, "export", run, "out", "--image-size", "1", "2", "3")
    assert "--to" in error(capsys, "export", run, "out", "--to", "coreml")
    assert sorted(p.name for p in here.iterdir() if p.name != "cache") == [n for n in before if n != "cache"]
