"""The train command as a user runs it: whole runs at tiny size, and one line with exit code 2 for every mistake."""

import json
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from support.commands import TINY, error
from unet_denoiser import Run, UNet, sample
from unet_denoiser.cli.app import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNET_DENOISER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(tmp_path):
    main(["train", "digits", "--out", "run", *TINY])
    return tmp_path / "run"


def test_trains_and_samples_the_digits(run, capsys):
    config = json.loads((run / "config.json").read_text())
    assert (config["training"]["steps"], config["training"]["batch_size"]) == (3, 4)
    assert (config["model"]["model_channels"], config["model"]["num_classes"]) == (8, 10)
    assert config["process"]["prediction_type"] == "v_prediction"
    main(["sample", str(run), "--num-images", "20", "--num-inference-steps", "2", "--guidance-scale", "2"])
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "samples.png")
    with Image.open(run / "samples.png") as image:
        assert (image.width > 2 * 34 + 2, image.height) == (True, 10 * 34 + 2)  # a row for each class, and its name


def test_the_first_lines_say_what_is_trained_on_what(capsys):
    main(["train", "digits", "--out", "run", *TINY])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "reading digits ..."
    assert lines[1].startswith("digits: 1,438 images of 8x8, 1 channel; 10 classes (0, 1, 2, 3, 4, ...)")
    assert "parameters, levels of 8, 16 channels; on cpu in float32" in lines[2]
    assert lines[3] == "training: 3 steps of 4 images, which shows each image 0.0083 times"
    assert lines[4] == f"run: run, with previews in {Path('run/samples')}"
    main(["train", "--resume", "run", "--steps", "5"])
    printed = capsys.readouterr().out
    assert "training: 5 steps of 4 images, which shows each image 0.014 times; goes on after step 3" in printed


def test_a_precision_that_the_device_chose_is_said_and_kept(monkeypatch, capsys):
    with monkeypatch.context() as on_a_gpu:
        on_a_gpu.setattr("unet_denoiser.training.distributed.default_precision", lambda device: "bf16")
        main(["train", "digits", "--out", "run", *TINY])
        assert "on cpu in bfloat16 (float32 with --mixed-precision no)" in capsys.readouterr().out
    assert Run.load("run").training.mixed_precision == "bf16"
    main(["train", "--resume", "run", "--steps", "4"])  # where the default is float32
    assert "on cpu in bfloat16" in capsys.readouterr().out
    main(["train", "--resume", "run", "--steps", "5", "--mixed-precision", "no"])
    assert "on cpu in float32\n" in capsys.readouterr().out
    monkeypatch.setattr("unet_denoiser.training.distributed.default_precision", lambda device: "bf16")
    main(["train", "--resume", "run", "--steps", "6"])
    assert "on cpu in float32\n" in capsys.readouterr().out
    assert Run.load("run").training.mixed_precision == "no"


def test_something_is_said_before_torch_is_imported():
    code = """
import sys
def shown(text, **options): print(text, 'torch' in sys.modules, file=sys.stderr)
import builtins, unet_denoiser.cli.train as module
module.print = shown
try: module.train('nowhere')
except SystemExit: pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[0] == "reading nowhere ... False"


def test_the_number_of_steps_is_chosen_by_timing_and_nothing_else_depends_on_that(tmp_path, capsys, monkeypatch):
    """Whoever gives that number has the same weights, also after a resume."""
    monkeypatch.setattr("unet_denoiser.training.launch.TIMED_STEPS", 3)
    without_steps = TINY[: TINY.index("--steps")] + TINY[TINY.index("--steps") + 2 :]
    monkeypatch.setattr("unet_denoiser.training.launch.default_steps", lambda count, size, seconds: 3)
    main(["train", "digits", "--out", "chosen", *without_steps])
    assert "about 1 min at" in capsys.readouterr().out
    main(["train", "digits", "--out", "given", *TINY])
    chosen, given = (Run.load(name) for name in ("chosen", "given"))
    assert chosen.training == given.training
    for name, weights in chosen.load_model().state_dict().items():
        assert torch.equal(weights, given.load_model().state_dict()[name])
    metrics = [Path(name, "metrics.jsonl").read_text().splitlines() for name in ("chosen", "given")]
    for a, b in zip(*metrics, strict=True):
        assert json.loads(a) | {"data_wait": 0} == json.loads(b) | {"data_wait": 0}


def test_sample_returns_the_same_as_the_library(run):
    args = "--num-images 3 --seed 5 --class 7 2 --num-inference-steps 2 --sampler ddim --guidance-scale 3 --separate"
    main(["sample", str(run), *args.split(), "--out", str(run / "new" / "a.png")])
    files = sorted((run / "new" / "a-separate").iterdir())
    assert [f.name for f in files] == ["000005-7.png", "000006-2.png", "000007-7.png"]
    loaded = Run.load(run)
    options = {"num_inference_steps": 2, "sampler": "ddim", "guidance_scale": 3.0}
    labels = torch.tensor([7, 2, 7])
    x = sample(UNet.from_pretrained(run / "model"), loaded.process, seeds=[5, 6, 7], class_labels=labels, **options)
    for file, image in zip(files, x, strict=True):
        with Image.open(file) as picture:
            found = torch.from_numpy(np.array(picture).astype(np.float32))
        assert_close(found, ((image[0] + 1) * 127.5).clamp(0, 255), rtol=0, atol=0.51)


def test_resumes_to_more_steps(run, capsys):
    main(["train", "--resume", str(run), "--steps", "5"])
    assert Run.load(run).training.steps == 5
    assert [p.name for p in Run.load(run).checkpoints.paths()] == [
        "step-00000003.safetensors",
        "step-00000005.safetensors",
    ]
    assert "to sample: unet-denoiser sample" in capsys.readouterr().out
    assert "seed cannot change with --resume" in error(capsys, "train", "--resume", run, "--seed", 1)
    assert "image_size cannot change" in error(capsys, "train", "--resume", run, "--image-size", 4)
    assert "model cannot change" in error(capsys, "train", "--resume", run, "--model.dropout", 0)
    assert "steps=2" in error(capsys, "train", "--resume", run, "--steps", 2)


@pytest.fixture
def on_folders(tmp_path):
    """A run on a folder of images, paired with another folder; both have moved since."""
    for name in ("images", "paired"):
        (tmp_path / "old" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "old" / name / f"{i}.png")
    main(["train", "old/images", "--concat", "old/paired", "--out", "run", *TINY])
    (tmp_path / "old").rename(tmp_path / "new")
    return tmp_path / "run"


@pytest.mark.parametrize("options", ["flow --process.shift 3", "edm --loss-weighting min_snr --noise-offset 0.1"])
def test_other_paths_do_what_vp_does(options, capsys):
    """Train, resume exactly, sample with guidance, another sampler and reuse, diagnose, and start a new training."""
    train = ["train", "digits", *TINY, "--checkpoint-every", "1", "--process.path", *options.split()]
    for name in ("run", "part"):
        main([*train, "--out", name])
    (Path("part") / "checkpoints" / "step-00000003.safetensors").unlink()
    shutil.rmtree("part/model")
    main(["train", "--resume", "part"])
    whole, resumed = (Run.load(name).load_model().state_dict() for name in ("run", "part"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    process = Run.load("run").process
    assert process.path == options.split()[0]
    few = ["--num-inference-steps", "3", "--num-images", "2"]
    main(["sample", "run", *few, "--out", "a.png", "--guidance-scale", "2", "--guidance-interval", "0.1", "9"])
    main(["sample", "run", *few, "--out", "b.png", "--sampler", "heun", "--sigma-schedule", "karras"])
    main(["sample", "run", *few, "--out", "c.png", "--reuse", "2"])
    main(["doctor", "run", "--num-samples", "4"])
    main(["train", "digits", *TINY, "--out", "vp", "--init", "run", "--process.path", "vp"])
    assert Run.load("vp").process.prediction_type == "v_prediction"


def test_options_of_another_path_are_one_line(capsys):
    assert "shift=3.0 is an option of path='flow'" in error(capsys, "train", "digits", "--process.shift", "3")
    message = error(capsys, "train", "digits", "--process.path", "flow", "--process.prediction-type", "noise")
    assert "prediction_type='noise' is not one of 'epsilon', 'sample'" in message


def test_data_that_moved_are_given_to_a_resume(on_folders, capsys):
    resume = ["train", "--resume", "run", "--steps", "4"]
    assert "images does not exist; give --data if it has moved" in error(capsys, *resume)
    assert "images does not exist; give --data if it has moved" in error(capsys, "doctor", "run")
    assert "images does not exist; give --data if it has moved" in error(capsys, "evaluate", "run")
    assert "paired does not exist; give --concat" in error(capsys, *resume, "--data", "new/images")
    assert "nowhere does not exist" in error(capsys, *resume, "--data", "nowhere")
    assert "vae cannot change with --resume" in error(capsys, *resume, "--vae", "new")
    assert "data=new: give it without --data" in error(capsys, "train", "--data", "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the data are the same
        main([*resume, "--data", "new/images", "--concat", "new/paired"])
    found = Run.load("run").data
    assert (found.source, found.concat) == (str(Path("new/images").absolute()), str(Path("new/paired").absolute()))


@pytest.mark.parametrize(("part", "name", "value"), [("training", "seed", 5), ("data", "horizontal_flip", True)])
def test_an_edited_option_is_refused_by_name(run, capsys, part, name, value):
    config = json.loads((run / "config.json").read_text())
    config[part][name] = value
    (run / "config.json").write_text(json.dumps(config))
    assert f"has {name}={value}" in error(capsys, "train", "--resume", run, "--steps", 5)


def test_trains_on_a_folder_of_colour_images(tmp_path, capsys):
    for name, colour in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20, 14), colour).save(tmp_path / "pets" / name / f"{i}.jpg")
    main(["train", "pets", "--image-size", "8", "6", *TINY])
    run = Run.load("runs/pets")
    assert (run.model.in_channels, run.model.image_size, run.data.class_names) == (3, (8, 6), ("cats", "dogs"))
    main(["sample", "runs/pets", "--class", "dogs", "--num-images", "2", "--num-inference-steps", "2"])
    with Image.open("runs/pets/samples.png") as image:
        assert image.mode == "RGB"
    assert "class='cow' is not one of cats, dogs" in error(capsys, "sample", "runs/pets", "--class", "cow")


def test_a_run_neither_joins_its_data_nor_takes_over_other_files(tmp_path, capsys):
    (tmp_path / "pets").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "pets" / f"{i}.png")
    assert "out=pets/run lies in the folder" in error(capsys, "train", "pets", "--out", "pets/run", *TINY)
    for name in ("checkpoints", "init"):
        (tmp_path / name / name).mkdir(parents=True)
        assert f"{name} has {name}, which a run would" in error(capsys, "train", "pets", "--out", name, *TINY)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".draft.tmp").touch()
    main(["train", "pets", "--out", "run", *TINY])
    assert (tmp_path / "run" / ".draft.tmp").exists()


def test_options_change_single_fields_of_the_network(capsys):
    main(["train", "digits", "--out", "run", *TINY, "--model.num-heads", "2"])
    assert Run.load("run").model.num_heads == 2
    message = error(capsys, "train", "digits", "--out", "other", *TINY, "--model.image-size", "4")
    assert "model.image_size=4: the data have (8, 8); give image_size instead" in message


def test_warns_of_captions_that_are_not_learned(tmp_path):
    np.savez("d.npz", images=np.zeros((4, 8, 8), np.uint8), captions=["a", "b", "c", "d"])
    with pytest.warns(UserWarning, match="captions, which are not learned without a text_encoder"):
        main(["train", "d.npz", *TINY])


def test_errors_of_training_are_one_line(tmp_path, capsys):
    images = np.full((4, 8, 8), 1.4, np.float32)
    images[0] = -1
    np.savez("d.npz", images=images)
    assert "1.4" in error(capsys, "train", "d.npz", *TINY)


def test_unlabelled_arrays_of_two_channels(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 2), np.uint8)
    np.savez("d.npz", images=images)
    main(["train", "d.npz", *TINY, "--process.prediction-type", "v_prediction"])
    assert Run.load("runs/d").process.prediction_type == "v_prediction"
    main(["sample", "runs/d", "--num-images", "3", "--num-inference-steps", "2", "--image-size", "12"])
    assert np.load("runs/d/samples.npy").shape == (3, 2, 12, 12)
    message = error(capsys, "sample", "runs/d", "--guidance-scale", 2)
    assert "guidance_scale=2.0 needs a class" in message
    assert "trained without classes" in error(capsys, "sample", "runs/d", "--class", "a")


def test_channels_follow_learned_variance_and_self_conditioning(tmp_path, capsys):
    options = "--process.variance-type learned_range --process.self-conditioning --loss-weighting learned"
    main(["train", "digits", "--out", "run", *TINY, *options.split(), "--noise-offset", "0.1"])
    run = Run.load("run")
    assert (run.model.in_channels, run.model.out_channels) == (2, 2)
    assert (run.process.variance_type, run.process.self_conditioning) == ("learned_range", True)
    main(["train", "--resume", "run", "--steps", "4"])
    for sampler in ("ddpm", "dpm++"):
        options = f"--num-images 10 --num-inference-steps 2 --guidance-scale 2 --sampler {sampler} --out {sampler}.png"
        main(["sample", "run", *options.split()])
        assert Path(f"{sampler}.png").exists()
    assert "self_conditioning=True" in error(capsys, "convert", "run", "pipeline", "--to", "pipeline")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train", "give either DATA or --resume RUN"),
        ("train ''", "source='' names no data"),
        ("train nowhere", "nowhere is not 'digits'"),
        ("train digits --steps 0", "steps=0"),
        ("train digits --learning-rate inf", "learning_rate=inf must be positive and finite"),
        ("train digits --process.clip-sample-range inf", "clip_sample_range=inf must be positive and finite"),
        ("train digits --seed 99999999999999999999999", "must fit 63 bits"),
        ("train digits --out ''", "--out: an empty path names no file"),
        ("train digits --out .", "names no new directory"),
        ("train digits --out x --num-workers 99999999999999999999", "num_workers=99999999999999999999 must be at most"),
        ("train digits --model.num-heads 7", "num_heads=7"),
        ("train digits --model.norm-groups 0", "norm_groups=0 must be at least 1"),
        ("train digits --model.context-dim 8", "context_dim=8, but the data have no context"),
        ("train digits --process.clip-sample-range -1", "clip_sample_range=-1.0"),
        (
            "train digits --loss-weighting truncated_snr --process.prediction-type epsilon",
            "loss_weighting='truncated_snr' with prediction_type='epsilon'",
        ),
        (
            "train digits --model.out-channels 2",
            "a network with a learned variance needs variance_type='learned_range'",
        ),
        ("train digits --preset sd-9", "preset='sd-9' is not one of specification"),
        ("train digits --image-size 4 4 4", "image_size"),
        ("train digits --shuffle-buffer 0", "shuffle_buffer=0 must be at least 1"),
        ("train digits --aspect-buckets", "aspect_buckets=True means nothing for arrays"),
        ("train --resume nowhere", "nowhere holds no run"),
        ("sample nowhere", "nowhere holds no run"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(capsys, tmp_path, args, message):
    assert message in error(capsys, *shlex.split(args))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--guidance-scale", "nan", "guidance_scale=nan must be a finite number"),
        ("--num-images", 0, "num_images=0 must be at least 1"),
        ("--num-inference-steps", 0, "num_inference_steps=0 must be at least 1"),
        ("--batch-size", 0, "batch_size=0"),
        ("--image-size", 0, "image_size"),
        ("--seed", 2**63, "seed=9223372036854775808 must fit 64 bits"),
        ("--out", "run", "out=run holds something else than samples; give a new folder"),
        ("--class", "cat", "class='cat' is not one of 0, 1, 2"),
    ],
)
def test_mistakes_in_sampling(run, capsys, option, value, message):
    assert message in error(capsys, "sample", run, option, value)
    assert not (run / "samples.png").exists()


def test_damaged_runs_are_one_line(run, capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "out=file is a file; give a directory" in error(capsys, "train", "digits", "--out", "file", *TINY)
    for checkpoint in (run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    message = error(capsys, "train", "--resume", run, "--steps", 5)
    assert "run/checkpoints has no checkpoint that can be used" in message
    assert "step-00000003.safetensors cannot be read" in message
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors is not a readable safetensors file" in error(capsys, "sample", run)
    shutil.rmtree(run / "model")
    assert "run has no model yet: its first checkpoint was not reached" in error(capsys, "convert", run, "new")
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(json.dumps(json.loads(config) | {"model": []}))
    assert "it lacks model" in error(capsys, "sample", run)
    (run / "config.json").write_text(config.replace('"steps"', '"stepz"'))
    assert "has an option of another version" in error(capsys, "sample", run)
    (run / "config.json").write_text(config[:50])
    assert "config.json is not valid JSON" in error(capsys, "sample", run)


def test_an_existing_run_is_not_overwritten(run, capsys):
    before = (run / "config.json").read_text()
    assert "already holds a run, which unet-denoiser train --resume" in error(
        capsys, "train", "digits", "--out", run, *TINY
    )
    assert (run / "config.json").read_text() == before
