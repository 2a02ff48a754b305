"""Published pipelines by the commands: sample, info, evaluate and train take them as they take a run."""

import re

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from support import pipelines
from unet_denoiser import Pipeline, Run
from unet_denoiser.cli.app import main
from unet_denoiser.training.pipelines import load_pipeline

FAST = ("--num-images", "2", "--num-inference-steps", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "sd"
    pipelines.stable_diffusion(folder)
    return folder


def captioned(folder, count=16):
    folder.mkdir()
    rng, rows = np.random.default_rng(0), ["file_name,text"]
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,a {'red fox' if i % 2 else 'blue house'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def error(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, args)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_sample_and_info_take_a_folder(folder, here, capsys):
    main(["sample", str(folder), "--caption", "a red fox", *FAST])
    assert capsys.readouterr().out == "sd-samples.png\n"
    assert (here / "sd-samples.png").is_file()
    main(["info", str(folder)])
    told = capsys.readouterr().out
    assert "StableDiffusionPipeline, for generation" in told
    assert "scheduler: DDIMScheduler (epsilon, scaled_linear betas, leading timesteps)" in told
    assert re.search(r"total +790,404", told)
    assert "draws what a caption says" in error(capsys, "sample", folder)
    assert "is no run, so it has no checkpoints" in error(capsys, "sample", folder, "--checkpoint", "best")
    assert "has its own; leave it out" in error(capsys, "sample", folder, "--vae", folder)


def test_a_single_file_takes_the_rest_from_options(folder, here, capsys):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert "needs a vae" in error(capsys, "sample", file, "--num-images", 1)
    assert "needs a text_encoder" in error(capsys, "sample", file, "--vae", folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    options = {"vae": str(folder / "vae"), "text_encoder": str(folder)}
    single, whole = load_pipeline(file, **options), Pipeline.from_pretrained(folder)
    found, expected = (each.encode_captions(["a red fox"]).context for each in (single, whole))
    assert torch.equal(found, expected)
    assert single.process.step_rules == whole.process.step_rules
    assert single.sampling_config() == whole.sampling_config()
    assert (single.data.image_size, single.published.name) == (whole.data.image_size, whole.published.name)


def test_a_training_starts_from_a_pipeline(folder, here, capsys):
    data = captioned(here / "data")
    options = ["--steps", "2", "--batch-size", "4", "--image-size", "16", "--device", "cpu"]
    main(["train", str(data), "--init", str(folder), "--out", "run", *options])
    assert "its text_encoder and vae prepare the data" in capsys.readouterr().out
    run = Run.load("run")
    assert (run.data.text_encoder, run.data.vae) == (str(folder), str(folder))
    assert run.process.to_dict()["beta_schedule"] == "scaled_linear"
    main(["sample", "run", "--caption", "a red fox", "--guidance-scale", "3", *FAST])
    assert (here / "run" / "samples.png").is_file()


def test_a_training_refuses_what_it_cannot_condition(here, capsys):
    pipelines.stable_diffusion(here / "edits", diffusers.StableDiffusionInstructPix2PixPipeline, "instruct-pix2pix")
    told = error(capsys, "train", captioned(here / "data"), "--init", here / "edits")
    assert "a StableDiffusionInstructPix2PixPipeline is given an image as its pipeline prepares it" in told


def test_evaluate_takes_captions_from_the_data(folder, here, capsys):
    data, few = captioned(here / "data"), ["--num-samples", "20", "--allow-few", "--extractor", "pixels"]
    assert "does not know its training data; give data" in error(capsys, "evaluate", folder, *few)
    main(["evaluate", str(folder), "--data", str(data), *few, "--num-inference-steps", "2", "--device", "cpu"])
    assert (here / "sd-evaluation" / "report.json").is_file()


def test_a_hub_name_is_downloaded_whole(folder, here, monkeypatch, capsys):
    asked = []

    def download(name, file, **_):
        asked.append((name, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, **_: asked.append(name) or str(folder))
    main(["sample", "owner/name", "--caption", "fox", *FAST])
    assert asked == [("owner/name", "model_index.json"), "owner/name"]
    assert capsys.readouterr().out == "name-samples.png\n"


def test_a_hub_name_without_the_hub_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    told = error(capsys, "sample", "owner/name")
    assert "owner/name is no directory here, and model_index.json cannot be had from the hub" in told
    assert told.count("\n") == 1
