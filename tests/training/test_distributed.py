"""Two processes train as one does, with DDP and FSDP2, and resume from each other's checkpoints."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.trainings import NET, two_classes, without_times
from unet_denoiser import DataConfig, Diffusion, DistillationConfig, Run, TrainingConfig, UNet
from unet_denoiser.data.dataloader import make_loader
from unet_denoiser.training.checkpoints import read_checkpoint
from unet_denoiser.training.loop import load_trainer, train

OPTIONS = {"steps": 6, "batch_size": 8, "gradient_accumulation_steps": 2, "checkpoint_every": 1, "keep_last": 9}


def new_run(path, data, config, **options):
    found = DataConfig(str(data), (4, 4), 1, class_names=("low", "high"))
    training = TrainingConfig(**OPTIONS, warmup_steps=2, device="cpu", preview_every=4, **options)
    run = Run(path, found, config, Diffusion(), training)
    run.write()
    run.checkpoints.folder.mkdir(parents=True)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`one`: six steps in one process. In two, from one's second step on: `ddp`, `fsdp`; from ddp's third: `again`.

    `ddp-compiled` and `fsdp-compiled` compile their blocks.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = two_classes()
    np.savez(folder / "two.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    config = UNet(**NET | {"num_classes": 2, "dropout": 0.0}).config
    one = new_run(folder / "one", folder / "two.npz", config)
    list(train(one, load_trainer(one)))
    for name in ("ddp", "fsdp", "again", "ddp-compiled", "fsdp-compiled"):
        other = new_run(folder / name, folder / "two.npz", config, compile=name.endswith("compiled"))
        if name != "again":
            shutil.copy(one.checkpoints.find("2"), other.checkpoints.folder)
    run_worker(folder)
    return folder


def run_worker(*args):
    worker = Path(__file__).parents[1] / "support" / "distributed_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker, *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A student of a random teacher: `one` in one process, `ddp` and `fsdp` in two from its second step on."""
    folder = tmp_path_factory.mktemp("distilled")
    data = two_classes()
    np.savez(folder / "two.npz", images=data.images[:, 0].numpy(), labels=data.labels.numpy())
    teacher = UNet(**NET | {"num_classes": 2, "dropout": 0.0})
    for name in ("one", "ddp", "fsdp"):
        run = new_run(folder / name, folder / "two.npz", teacher.config)
        process = run.process.distilled(DistillationConfig(2, 2.0, 4))
        run = replace(run.with_training(condition_dropout=0.0), process=process)
        run.write()
        teacher.save_pretrained(run.path / "init")
        if name == "one":
            list(train(run, load_trainer(run)))
        else:
            shutil.copy(Run.load(folder / "one").checkpoints.find("2"), run.checkpoints.folder)
    run_worker(folder, "distilled")
    return folder


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_distil_as_one(distilled, engine):
    assert largest_difference(end(distilled / "one")[0], end(distilled / engine)[0]) < 1e-6


def end(path):
    """Return tensors and metadata of the checkpoint of step 6."""
    tensors, metadata = read_checkpoint(Run.load(path).checkpoints.find("6"))
    return {name: tensors[name] for name in tensors}, metadata


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "ddp-compiled", "fsdp-compiled"])
def test_two_processes_train_as_one(folder, engine):
    """Weights, averages and moments of the optimizer, and the logged losses; the order of float32 sums differs."""
    one, metadata = end(folder / "one")
    two, two_metadata = end(folder / engine)
    rounding = 1e-5 if engine.endswith("compiled") else 1e-6
    assert largest_difference(one, two) < rounding
    assert metadata["step"] == two_metadata["step"] == 6
    lines = [json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", engine)]
    for name in ("loss", "grad_norm", "learning_rate", "loss_per_level"):
        assert lines[1][name] == pytest.approx(lines[0][name], rel=rounding)


def test_two_processes_resume_bit_for_bit(folder):
    (straight, metadata), (resumed, resumed_metadata) = end(folder / "ddp"), end(folder / "again")
    assert largest_difference(straight, resumed) == 0
    assert metadata == resumed_metadata
    lines = [without_times((folder / name / "metrics.jsonl").read_text()) for name in ("ddp", "again")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_one_process_resumes_from_two(folder, engine):
    source = Run.load(folder / engine)
    back = new_run(folder / f"back-{engine}", folder / "two.npz", source.model)
    shutil.copy(source.checkpoints.find("4"), back.checkpoints.folder)
    list(train(back, load_trainer(back)))
    assert largest_difference(end(folder / "one")[0], end(back.path)[0]) < 1e-6


def test_each_sample_is_seen_once_in_an_epoch():
    data = two_classes()
    seen = []
    for process in range(2):
        loader = make_loader(data, 8, seed=0, start=0, stop=4, num_processes=2, process_index=process)
        seen += [image for batch in loader for image in batch["image"]]
    values = sorted(image.flatten().tolist() for image in seen)
    assert values == sorted(image.flatten().tolist() for image in data.images)


def test_refuses_batches_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch_size=8 cannot be divided into 3 equal parts"):
        TrainingConfig(batch_size=8, gradient_accumulation_steps=3)
