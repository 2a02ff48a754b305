"""Files that commit 3ebf34a wrote, before the package got its present layout: they load, resume and grow.

Each was made once by the command of that commit (a run of two steps, that run resumed to four, a folder of samples of
it, a converted checkpoint). On one machine all of it is equal bit for bit; the bounds below are for other processors.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from unet_denoiser import UNet
from unet_denoiser.cli.app import main

OLD = Path(__file__).parents[1] / "support" / "old"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD / "run", tmp_path / "run"))


def test_an_old_run_resumes_as_the_old_code_did(run):
    before = load_file(run / "checkpoints" / "step-00000002.safetensors")
    main(["train", "--resume", str(run), "--steps", "4"])
    found = load_file(run / "checkpoints" / "step-00000004.safetensors")
    expected = load_file(OLD / "resumed.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    for kind in (
        "model.",
        "ema.",
        "optimizer.exp_avg.",
        "optimizer.exp_avg_sq.",
        "weighting.",
    ):  # keys' biases: rounding
        names = [name for name in expected if name.startswith(kind)]
        new, old, start = (torch.cat([file[n].flatten().float() for n in names]) for file in (found, expected, before))
        assert (new - old).norm() <= 1e-3 * (old - start).norm(), kind


def test_an_old_folder_of_samples_grows(run, tmp_path):
    folder = Path(shutil.copytree(OLD / "samples", tmp_path / "samples"))
    first = (folder / "000000-000007.npz").read_bytes()
    options = ["--num-images", "12", "--batch-size", "1", "--num-inference-steps", "2", "--out", str(folder)]
    # the settings hold the old path's weights and process, not its name
    main(["sample", str(run), *options])
    assert (folder / "000000-000007.npz").read_bytes() == first
    with np.load(folder / "000008-000011.npz") as found, np.load(OLD / "grown.npz") as expected:
        assert found.files == expected.files
        assert np.array_equal(found["seeds"], expected["seeds"])
        assert np.abs(found["images"].astype(int) - expected["images"]).max() <= 1


def test_old_samples_are_sampled_again(run, tmp_path):
    folder = tmp_path / "again"
    main(
        [
            "sample",
            str(run),
            "--num-images",
            "8",
            "--batch-size",
            "1",
            "--num-inference-steps",
            "2",
            "--out",
            str(folder),
        ]
    )
    with np.load(folder / "000000-000007.npz") as found, np.load(OLD / "samples" / "000000-000007.npz") as expected:
        assert np.abs(found["images"].astype(int) - expected["images"]).max() <= 1


def test_an_old_converted_file_loads(tmp_path):
    model = UNet.from_pretrained(
        OLD / "converted.safetensors", num_heads=2, image_size=8, norm_groups=2, qkv_order="legacy"
    )
    with np.load(OLD / "expected.npz") as file:
        x, t, labels, expected = (torch.from_numpy(file[name]) for name in ("x", "t", "labels", "out"))
    with torch.no_grad():
        assert_close(model(x, t, class_labels=labels), expected, rtol=1e-4, atol=1e-5)
