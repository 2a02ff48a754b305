"""The convert command: there and back through every format, and mistakes that leave nothing behind."""

import json

import diffusers
import numpy as np
import pytest
import torch

from support.family import FAMILY
from support.networks import randomise
from unet_denoiser import Run, UNet, sample
from unet_denoiser.cli.app import main


@pytest.fixture
def model():
    return randomise(UNet(**FAMILY)).eval()


def test_there_and_back_through_every_format(model, tmp_path, capsys, monkeypatch):
    """The last copy equals the first."""
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ours")
    main(["convert", "ours", "theirs", "--to", "diffusers"])
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    main(["convert", "theirs", "a.safetensors", "--to", "ldm"])
    main(["convert", "a.safetensors", "b.safetensors", "--to", "adm", "--num-heads", "1"])
    main(["convert", "b.safetensors", "again", "--num-heads", "1"])
    again = UNet.from_pretrained("again")
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in again.state_dict().items())
    assert capsys.readouterr().out.splitlines()[-1].startswith("again: ")
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", "ours", "theirs"])
    assert exit_info.value.code == 2
    assert "theirs exists; give a new name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("ours new --ema", "this library's own, which tells all; leave out ema"),
        ("ours new --num-heads 2", "leave out num_heads"),
        ("ours new --to pipeline --verify --lora x --variant fp16", "leave out variant, verify, lora"),
        ("ours new --lora-scale 2", "lora_scale=2.0 needs lora"),
        ("ours new --lora x --lora-scale nan", "lora_scale=nan must be a finite number"),
        ("ours new --lora x", "x is no file"),
        ("ours new --to ldm", "give a name that ends in .safetensors"),
        ("nowhere new", "nowhere is neither a directory nor a hub"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(args, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ours")
    with pytest.raises(SystemExit, match="2"):
        main(["convert", *args.split()])
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize("to", ["unet-denoiser", "diffusers"])
def test_a_full_disk_leaves_no_half_of_a_folder(to, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("ours")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "ours", "new", "--to", to])
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_a_run_becomes_a_pipeline_that_samples_the_same(tmp_path, monkeypatch):
    """diffusers opens the folder alone; fed with the same noise, its network and schedule give our images."""
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (8, 8, 8), np.uint8)
    np.savez("d.npz", images=images)
    options = "--steps 2 --batch-size 4 --model.model-channels 8 --model.norm-groups 4 --device cpu"
    main(["train", "d.npz", "--out", "run", *options.split()])
    main(["convert", "run", "pipeline", "--to", "pipeline"])
    pipeline = diffusers.DiffusionPipeline.from_pretrained("pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is diffusers.DDPMPipeline
    drawn = pipeline(batch_size=1, generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np")
    run = Run.load("run")
    ours = sample(run.load_model(), run.process, seeds=[5], sampler="ddpm", num_inference_steps=4)
    expected = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.as_tensor(drawn.images), expected, rtol=0, atol=1e-4)
    main(["train", "digits", "--out", "classes", *options.split()])
    with pytest.raises(SystemExit):
        main(["convert", "classes", "refused", "--to", "pipeline"])
    assert not (tmp_path / "refused").exists()
